"""`python -m regrowth` is the `regrowth` command."""

from regrowth.launch.main import main

if __name__ == "__main__":
    main()
