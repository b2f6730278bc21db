"""`python -m ep`: the command line, where the script `ep` is not on the path."""

from ep.cli import main

if __name__ == "__main__":
    main()
