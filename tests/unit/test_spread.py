"""Shards over hosts: as even as room allows, never more than fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ep.cluster.spread import Host, spread

NEEDS = {"CPU": 2.0, "GPU": 0.5}
ROOMS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def hosts(rooms: list[int]) -> list[Host]:
    """With room for so many shards each, and not for one more."""
    return [Host(f"10.0.0.{i}", f"node{i}", {"CPU": 2.0 * room + 1.9, "GPU": 8.0}) for i, room in enumerate(rooms)]


@given(ROOMS, st.integers(1, 20))
def test_on_all_hosts_with_room(rooms: list[int], num_shards: int) -> None:
    placed = spread(hosts(rooms), NEEDS, num_shards, None)
    assert (placed is None) == (sum(rooms) < num_shards)
    if placed is None:
        return
    taken = [placed.count(host.address) for host in hosts(rooms)]
    assert sum(taken) == num_shards
    assert all(count <= room for count, room in zip(taken, rooms, strict=True))
    assert placed == sorted(placed), "the shards of a host are neighbours"
    # Nobody could take one over from a host with two more.
    spare = [count for count, room in zip(taken, rooms, strict=True) if count < room]
    assert not spare or max(taken) <= min(spare) + 1


@given(ROOMS, st.integers(1, 12), st.integers(1, 4))
def test_on_so_many_hosts(rooms: list[int], num_shards: int, num_hosts: int) -> None:
    placed = spread(hosts(rooms), NEEDS, num_shards, num_hosts)
    if placed is None:
        share = -(-num_shards // num_hosts)
        assert sum(room >= share for room in rooms) < num_hosts or num_shards < num_hosts
    elif num_shards >= num_hosts:
        assert len(set(placed)) == num_hosts and len(placed) == num_shards


def test_the_first_hosts_are_taken_and_what_a_shard_takes_nothing_of_is_no_limit() -> None:
    assert spread(hosts([3, 3, 3]), NEEDS, 4, 2) == ["10.0.0.0"] * 2 + ["10.0.0.1"] * 2
    assert spread(hosts([0, 1]), {"CPU": 0.0}, 3, 1) == ["10.0.0.0"] * 3
    assert spread(hosts([5]), NEEDS | {"TPU": 1.0}, 1, None) is None


def test_what_routers_take_of_their_host_is_not_given_to_shards() -> None:
    first, second = (Host(f"10.0.0.{i}", f"node{i}", {"CPU": 64.0, "GPU": 8.0}) for i in range(2))
    needs = {"CPU": 1.0, "GPU": 1.0}
    assert spread([first.without({"GPU": 1.0}), second], needs, 16, None) is None
    placed = spread([first.without({"GPU": 1.0}), second], needs, 15, 2)
    assert placed == ["10.0.0.0"] * 7 + ["10.0.0.1"] * 8
