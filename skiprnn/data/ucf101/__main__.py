"""Make a UCF-101 feature store: python -m skiprnn.data.ucf101 extract|convert (see their --help)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from skiprnn.data.base import DataError
from skiprnn.data.ucf101.extract import convert, extract
from skiprnn.data.ucf101.store import FeatureStore


class Parser(argparse.ArgumentParser):
    """Also of each command."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m skiprnn.data.ucf101", description="Make a UCF-101 feature store.")
    commands = parser.add_subparsers(dest="command", required=True)
    parse = commands.add_parser("extract", help="decode videos and run a frozen network on their frames")
    parse.add_argument("--videos", type=Path, required=True, help="folder that holds CLASS/*.avi")
    parse.add_argument("--store", type=Path, required=True, help="folder of the feature store")
    parse.add_argument("--backbone", default="resnet50", help="a torchvision classification network (%(default)s)")
    parse.add_argument("--weights", default="IMAGENET1K_V1", help="torchvision's name, or a file (%(default)s)")
    parse.add_argument("--classes", nargs="+", default=[], help="only these")
    parse.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parse.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parse.add_argument("--batch-size", type=int, default=32, help="frames at a time (%(default)s)")
    parse.add_argument("--workers", type=int, default=2, help="threads that decode (%(default)s)")
    parse = commands.add_parser("convert", help="take features that were stored as 8-bit numbers")
    parse.add_argument(
        "--features", type=Path, required=True, help="folder with clips.csv, scale.npy, features_u8_*.npz"
    )
    parse.add_argument("--store", type=Path, required=True, help="folder of the feature store")
    parse.add_argument("--backbone", default="mobilenet_v2", help="the network that they are of (%(default)s)")
    parse.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    broken: list[DataError] = []
    try:
        if command == "extract":
            broken = extract(**options)
        else:
            convert(**options)
        store = FeatureStore(options["store"])
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for reason in broken:
        print(f"left out: {reason}", file=sys.stderr)
    classes = len({clip.action for clip in store.clips})
    print(f"{store.folder}: {len(store.clips)} clips of {classes} classes; {len(broken)} videos left out")
    return 0 if store.clips else 1


if __name__ == "__main__":
    sys.exit(main())
