"""A checkpoint -> its metrics on validation or test data.

python -m skiprnn.evaluate outputs/mnist/skip_lstm_lambda0.0001/seed0_3f2a9c1b/best.ckpt
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from skiprnn import config, metrics
from skiprnn.module import stage_seed
from skiprnn.runs import load_weights, read_checkpoint
from skiprnn.train import USER_ERRORS, device_of, make_module


def evaluate(path: Path, split: str = "test", data_root: str = "data", device: str = "auto") -> dict[str, float]:
    """Metrics of a checkpoint on a whole split, weighted by examples; `inference_flops` per sequence.

    Raises:
        ConfigError, DataError: no such checkpoint, one of another architecture, or data that is missing.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint["run"] | {"data_root": data_root, "device": device}
    run = config.read(OmegaConf.create(settings))
    module = make_module(run, device_of(run)).to(device_of(run)).eval()
    load_weights(module, checkpoint, path)
    sums = metrics.EpochSums(module.data.task, module.device)
    torch.manual_seed(stage_seed(run.seed, split, 0))
    with torch.no_grad():
        for inputs, targets, lengths in module.data.evaluation_batches(split):
            prediction, updates = module.network(inputs, lengths)
            counts = metrics.state_updates(updates)
            losses = metrics.task_loss(module.data.task, prediction, targets)
            scores = metrics.score(module.data.task, prediction, targets)
            sums.add(losses, scores, counts, run.model.cost_per_sample * counts)
    results = sums.results()
    flops = metrics.inference_flops(module.network.rnn, results["state_updates"], module.data.steps)
    return results | {"inference_flops": flops}


def main() -> None:
    """Print a checkpoint's metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    try:
        results = evaluate(arguments.checkpoint, arguments.split, arguments.data_root, arguments.device)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    for name, value in results.items():
        print(f"{name:20} {value:.6g}")


if __name__ == "__main__":
    main()
