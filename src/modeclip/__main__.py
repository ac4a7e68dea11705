"""``python -m modeclip``: the command line, also for a launcher of modules (``torchrun -m modeclip train ...``)."""

from modeclip.cli import main

if __name__ == "__main__":
    main()
