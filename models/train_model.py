"""Train the fraud model: `python models/train_model.py --help`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from cerberus import __main__

if __name__ == "__main__":
    sys.exit(__main__.main(["train", *sys.argv[1:]]))
