"""A complete run for others: its weights as safetensors, with a model card."""

import inspect
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from torch import Tensor

from skiprnn.model import pretrained
from skiprnn.model.cells import CELLS
from skiprnn.model.policies import POLICIES
from skiprnn.model.pretrained import FILE, LAST
from skiprnn.model.recurrent import CLASSES, Recurrent
from skiprnn.papers.records import has_own_time, weights_file
from skiprnn.training.config import ConfigError
from skiprnn.training.folder import RunFolder, write_atomically
from skiprnn.training.measures import SCORES

CARD = """\
---
library_name: skiprnn
license: mit
tags: [{data}, {kind}, adaptive-computation]
---
# {kind} on {data}, seed {seed}

{about} {parameters:,} parameters with the readout.

| | |
| --- | --- |
| data | {data}: {data_says} |
| | {data_settings} |
| model | {model_settings} |
| protocol | {protocol}{note} |

## Results

The epoch with the best validation score, {epoch} of {epochs}{last}. FLOPs are multiplications of the recurrent network.

| | {score} | state updates of {steps} steps | inference FLOPs |
| --- | --- | --- | --- |
| validation | {validation_score} | {validation_updates:.2f} | |
| test | {test_score} | {test_updates:.2f} (std over sequences {test_updates_std:.2f}) | {flops:.2e} |

## Provenance

Run `{name}`, completed {completed} after {trained}. {code}; {versions}; {device}, engine {engine}.
The whole record is in the file's metadata, under `{key}`.

## How to load

```python
from skiprnn import {kind}

rnn = {kind}.from_pretrained("{file}", batch_first=True)  # the recurrent network alone
output, {state}, updates = rnn(x)  # x (batch, steps, {input_size}) float32
```

The prediction is `readout.weight @ h[-1] + readout.bias`, with the tensors of those names in the file{embedding}.
`python -m skiprnn.evaluate checkpoint={file}` measures the whole network on the test set.

## Limits

- One run: with another seed, {score} and skipped steps differ.
- What it skips was learned on {data}; other data, lengths or sampling rates can make it skip anything, or nothing.
- A network of a benchmark, for research; not tested for any other use.
"""


def card(record: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The model card of a run's best checkpoint, from the run's record and the network's tensors."""
    data, model, training = (record["config"][part] for part in ("data", "model", "training"))
    best, git = record["best"], record["git"]
    score = SCORES[record["task"]]
    digits = ".4f" if score == "accuracy" else ".3e"
    description = inspect.getdoc(get_class(data["_target_"])) or ""
    embedding = "; its input is the embedding of token ids, `embedding.weight`"
    note = record["profile"].get("note")
    return CARD.format(
        kind=CLASSES.get((model["cell"], model["policy"]), Recurrent).__name__,
        data=data["name"],
        seed=record["config"]["seed"],
        about=POLICIES[model["policy"]].about,
        parameters=record["parameters"],
        data_says=" ".join(description.split("\n\n")[0].split()),
        data_settings=_listed(data, "name", "_target_"),
        model_settings=_listed(model, "name"),
        protocol=f"Adam; {_listed(training)}",
        note=f". {note}" if note else "",
        epoch=best["epoch"] + 1,
        epochs=training["epochs"],
        last=f"; `{LAST}` is the last" if record["final"]["epoch"] != best["epoch"] else "",
        score=score,
        steps=record["steps"],
        validation_score=f"{best['validation'][score]:{digits}}",
        validation_updates=best["validation"]["state_updates"],
        test_score=f"{best['test'][score]:{digits}}",
        test_updates=best["test"]["state_updates"],
        test_updates_std=best["test"]["state_updates_std"],
        flops=best["test"]["inference_flops"],
        name=record["name"],
        completed=record["completed"],
        trained=f"{record['seconds']:.0f} s of training"
        + ("" if has_own_time(record) else " (of several runs at once)"),
        code=f"commit {git['commit']}{' with uncommitted changes' if git['dirty'] else ''}" if git else "no git commit",
        versions=", ".join(f"{package} {version}" for package, version in record["versions"].items()),
        device=record["device"],
        engine=record["engine"],
        key=pretrained.KEY,
        file=FILE,
        input_size=tensors["rnn.layers.0.weight_ih"].shape[1],
        state="(h, c)" if len(CELLS[model["cell"]].state_names) > 1 else "h",
        embedding=embedding if "embedding.weight" in tensors else "",
    )


def _listed(settings: dict[str, Any], *but: str) -> str:
    """`key` value, for all that are set."""
    return ", ".join(f"`{key}` {value}" for key, value in settings.items() if key not in but and value is not None)


def export(run: RunFolder, folder: Path) -> Path:
    """Write a complete run's weights and model card below folder/checkpoints; returns the path of the best weights."""
    record = run.record()
    target = weights_file(folder, record["name"])
    contents = {}
    try:
        files = {LAST: run.last} if record["final"]["epoch"] != record["best"]["epoch"] and run.last.exists() else {}
        for name, checkpoint in (files | {FILE: run.best}).items():
            weights = run.checkpoint(checkpoint)["state_dict"]
            tensors = {key.removeprefix("network."): tensor for key, tensor in weights.items()}
            contents[name] = pretrained.serialise(record, tensors)
        contents["README.md"] = card(record, tensors).encode()
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run.record_file} is damaged ({error!r}); delete it, and train the run again") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(target.with_name(name), content)
    return target
