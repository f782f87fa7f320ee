"""`python -m kvloom` is the same as `kvloom`."""

from kvloom.cli import main

if __name__ == "__main__":
    main()
