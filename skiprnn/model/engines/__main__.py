"""Compare the engines with the reference on the device at hand, and time them.

python -m skiprnn.model.engines check
"""

import argparse
import json

import torch

from skiprnn.model.engines import contact, trial

TIMED = [contact.Variant(*one, 1) for one in (("lstm", "always"), ("lstm", "skip"), ("gru", "always"))]


def table(device: str) -> None:
    """Print, per engine: variants served and passed, the largest error among these, ms per time step, what failed."""
    print(" ".join(f"{key} {value}," for key, value in contact.place(device).items()).rstrip(","))
    print(f"{'engine':10} {'passed':>8} {'error':>9} {'ms per step (LSTM, Skip LSTM, GRU)':>36}")
    for engine in ("native", "batched") if device == "cpu" else ("cuda", "triton", "batched"):
        found = contact.verdict(engine, device, contact.VARIANTS)
        found = {tested: error for tested, error in found.items() if not str(error).startswith(trial.NOT_SERVED)}
        passed = {tested: float(error) for tested, error in found.items() if contact.reason(error) is None}
        timed = [f"{trial.milliseconds(engine, device, tested):.3f}" if tested in passed else "-" for tested in TIMED]
        worst = f"{max(passed.values()):.1e}" if passed else "-"
        print(f"{engine:10} {f'{len(passed)}/{len(found)}':>8} {worst:>9} {'  '.join(timed):>36}")
        for tested, error in found.items():
            if tested not in passed:
                print(f"  refused for {tested}: {contact.reason(error)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m skiprnn.model.engines", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compare and time the engines")
    check.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    check.add_argument("--of", nargs=2, metavar=("ENGINE", "VARIANT"), help="the error of one, as JSON")
    arguments = parser.parse_args()
    if arguments.of:
        (tested,) = (one for one in contact.VARIANTS if str(one) == arguments.of[1])
        print(json.dumps(trial.check(arguments.of[0], arguments.device, tested)))
    else:
        table(arguments.device)


if __name__ == "__main__":
    main()
