"""So that `python -m launch` is the `gearshift` command."""

from launch.cli import main

if __name__ == "__main__":
    main()
