"""From expert loads to placements: replicate, pack, level, bound, compare. Pure: numpy and scipy, no I/O."""
