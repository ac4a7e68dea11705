"""``python -m modeclip``: the command line, also where a launcher wants a module (``torchrun -m modeclip train ...``)."""

from modeclip.cli import main

if __name__ == "__main__":
    main()
