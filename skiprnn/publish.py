"""Trained weights for others: the checkpoints of each complete run as safetensors, with a model card.

    python -m skiprnn.publish experiment=table1 profile=mnist/cpu publish=results/mnist-cpu
    python -m skiprnn.publish model=skip_lstm data=digits seed=0 publish=FOLDER

FOLDER/checkpoints/DATASET/ROW/seedK_HASH/
  model.safetensors    weights and the run's record, for SkipLSTM.from_pretrained and skiprnn.evaluate
  last.safetensors     the same at the last epoch, where another was the best
  README.md            the model card
"""

import shlex
import sys
from collections.abc import Sequence

from skiprnn.papers import plan
from skiprnn.papers.release import export
from skiprnn.training.config import ConfigError


def main(arguments: Sequence[str]) -> None:
    """Publish the complete runs that the command line asks for."""
    try:
        _, planned, folder = plan.requested(arguments)
        if not folder:
            raise ConfigError("publish=FOLDER is missing: where to?")
        complete = [one.folder for one in planned if one.folder.complete]
        if not complete:
            raise ConfigError(f"output={planned[0].run.output}: none of the {len(planned)} runs is complete")
        trained_here = [run for run in complete if run.best.exists()]
        for run in trained_here:
            file = export(run, folder)
            print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if elsewhere := len(complete) - len(trained_here):
        print(f"{elsewhere} of {len(planned)} runs left out: the record is here, the checkpoint is not")
    print(f"{len(trained_here)} of {len(planned)} runs published, each with its model card")
    if trained_here:
        verify = shlex.quote(f"verify={folder / 'checkpoints'}")
        print(f"Next: python -m skiprnn.evaluate {verify}; python -m skiprnn.tables {shlex.join(arguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
