"""Train a planned sweep on a GPU that is to be had for minutes at a time: all runs at once, a bit further each time.

    python -m skiprnn.sitting plan FOLDER experiment=table1 profile=mnist/paper 'rows=[1,2,3,4,5,6]'
    python -m skiprnn.sitting train FOLDER --minutes 9 --archive OUT

`plan` writes what is to be trained, in FOLDER, and needs Hydra. `train` does not: it checks the engines, times those
that are right, takes the fastest for each model, trains until the time is up, and puts the run folders into OUT, an
archive for each row (tar). Unpacked in FOLDER, here or elsewhere, the same command goes on; so does skiprnn.train.
With --engine NAME, of `plan` or `train`, that engine is checked and taken, and none is timed.
FOLDER/sitting.json keeps what was measured. If the sweep would take longer than --budget minutes, all its runs have
fewer epochs, decided before they begin.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skiprnn.model.engines import contact
from skiprnn.papers import plan
from skiprnn.training import job, setup
from skiprnn.training.command_line import arguments_of
from skiprnn.training.config import ConfigError, RunConfig
from skiprnn.training.estimate import seconds_per_epoch, seconds_per_step
from skiprnn.training.folder import RunFolder, write_atomically
from skiprnn.training.module import architecture
from skiprnn.training.timing import alternate, duration

RESERVE = 30.0  # seconds for the last checkpoints and the archives
STEPS = 4  # that are timed
HOPELESS = 2.0  # an engine that takes so many times the fastest's seconds for the first model is timed for no other


def candidates(device: torch.device) -> list[str]:
    """Engines that a step of all runs may take; those first that are likely to be fast."""
    return ["cuda", "triton", "batched"] if device.type == "cuda" else ["batched"]


def measure_torch(run: RunConfig) -> float:
    """Seconds of a training step of torch's own network of the same cell and size, cuDNN's on a GPU."""
    module = setup.make_module(replace(run, engine="reference"))  # of ours only the embedding is asked for anything
    inputs = module.network.embed(next(iter(module.data.training_batches(0)))[0]).detach()
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[run.model.cell]
    network = kind(inputs.shape[2], run.model.hidden_size, run.model.num_layers, batch_first=True).to(module.device)

    def step() -> None:
        network.zero_grad()
        network(inputs)[0][:, -1].sum().backward()
        network.bias_hh_l0.grad.sum().item()  # waits for the device

    return alternate({"torch": step}, STEPS)["torch"]


class Sitting:
    """What is known of a sweep's training in a folder: FOLDER/sitting.json, and what is to be trained.

    Args:
        folder: of run folders and plan.
        data_root, device: as in a run's config.
        engine: for all runs, in this sitting and later ones; "auto": the fastest again.

    Raises:
        ConfigError: nothing is planned there.
    """

    def __init__(self, folder: Path, data_root: str = "data", device: str = "auto", engine: str | None = None):
        self.folder, self.file = folder, folder / "sitting.json"
        self.place = ["--data-root", data_root, "--device", device]
        self.known: dict[str, Any] = json.loads(self.file.read_bytes()) if self.file.exists() else {}
        plans = plan.saved_plans(folder, lambda damage: print(damage, file=sys.stderr))
        if not plans:
            make = f"python -m skiprnn.sitting plan {folder} experiment=..."
            raise ConfigError(f"{folder}: no plan there; make one: {make}")
        settings: dict[str, Any] = {"data_root": data_root, "device": device, "logger": {"csv": job.OWN_LOGGER}}
        settings["engine"] = engine or self.known.get("engine", "auto")
        self.runs = [replace(one.run, **settings) for one in plans[0].planned]  # of the latest plan
        self.device = setup.device_of(self.runs[0])
        if engine:
            self.keep(engine=engine)

    def chosen(self) -> list[RunConfig]:
        """The runs, shortened alike if need be, each with the engine that is named or was the fastest."""
        epochs = self.known.get("epochs", self.runs[0].training.epochs)
        return [
            replace(run, engine=self.fastest(run), training=replace(run.training, epochs=epochs)) for run in self.runs
        ]

    def fastest(self, run: RunConfig) -> str:
        """The engine for a run; "auto" where none is named and none was timed."""
        if run.engine != "auto":
            return run.engine
        times = self.known.get("seconds", {}).get(architecture(run), {})
        return min(times, key=times.__getitem__) if times else "auto"

    def keep(self, **more: Any) -> None:
        """Remember, for the next sitting as well."""
        self.known |= more
        write_atomically(self.file, json.dumps(self.known, indent=2).encode())

    def child(self, name: str, *options: str, seconds: float) -> tuple[int, list[dict[str, Any]]]:
        """Run this module in a process of its own, which is told to end when the time is up: status, lines of JSON."""
        command = [sys.executable, "-m", "skiprnn.sitting", name, str(self.folder), *self.place, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True)
        ending = threading.Timer(max(seconds, 0.0), process.send_signal, [signal.SIGTERM])
        # with what it has started, which may hold the pipe
        killing = threading.Timer(max(seconds, 0.0) + RESERVE / 2, os.killpg, [process.pid, signal.SIGKILL])
        ending.start()
        killing.start()
        found = []
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found.append(json.loads(line))
            else:
                print(line, end="", flush=True)
        status = process.wait()
        ending.cancel()
        killing.cancel()
        with suppress(ProcessLookupError):  # what it may have left behind
            os.killpg(process.pid, signal.SIGKILL)
        return status, found

    def choose(self, left: Callable[[], float]) -> None:
        """Check the engines and time those that are right, unless that was done on such a machine.

        Raises:
            ConfigError: an engine that is named is not right for its run.
        """
        where = contact.place(self.device.type)
        named = self.runs[0].engine
        if named == "auto" and self.known.get("place") == where and self.known.get("seconds"):
            return
        engines = candidates(self.device) if named == "auto" else [named]
        variants = sorted({variant_of(run) for run in self.runs})
        most = min(contact.SECONDS, left() / 6)
        with ThreadPoolExecutor(len(engines)) as pool:
            checks = pool.map(lambda engine: contact.verdict(engine, self.device.type, variants, most), engines)
            found = dict(zip(engines, checks, strict=True))
        if named != "auto":
            for tested, error in found[named].items():
                if wrong := contact.reason(error):
                    raise ConfigError(f"--engine {named} for {tested}: {wrong}; --engine auto takes what is right")
            return
        right = [engine for engine in engines if not all(map(contact.reason, found[engine].values()))]
        self.keep(place=where, **self.times(right, left))

    def times(self, engines: list[str], left: Callable[[], float]) -> dict[str, dict[str, Any]]:
        """Seconds of a training step: of each model by each engine, and torch's of each cell."""
        seconds: dict[str, dict[str, float]] = {}
        torch_seconds: dict[str, float] = {}
        while engines:
            begun = None
            status, lines = self.child("time", "--of", *engines, seconds=left() / 4)
            for line in lines:
                if "torch" in line:
                    torch_seconds[line["torch"]] = line["seconds"]
                elif "row" in line:
                    seconds.setdefault(line["row"], {})[line["engine"]] = line["seconds"]
                else:
                    begun = line["engine"]
                    continue
                print(json.dumps(line), flush=True)
            if status == 0 or begun is None:
                break
            engines = [engine for engine in engines if engine != begun]  # it brought all down, or took too long
        return {"seconds": seconds, "torch": torch_seconds}

    def shorten(self, minutes: float, left: Callable[[], float]) -> None:
        """Decide the epochs, once: as many as planned, or all that fit.

        Raises:
            ConfigError: there was no time to measure them.
        """
        if "epochs" in self.known:
            return
        lines = self.child("time", seconds=left() / 2)[1]
        if not lines:
            raise ConfigError("an epoch of all runs could not be timed: give more --minutes, or no --budget")
        epoch = lines[0]["seconds"]
        epochs = max(1, min(self.runs[0].training.epochs, int(60 * minutes / epoch)))
        print(f"{len(self.runs)} runs: {duration(epoch)} an epoch: {epochs} epochs")
        self.keep(epoch=epoch, epochs=epochs)

    def archive(self, out: Path) -> None:
        """An archive for each row, and one of what is known."""
        out.mkdir(parents=True, exist_ok=True)
        content: dict[str, list[Path]] = {"sitting": [self.file, *sorted((self.folder / "sweeps").glob("*.json"))]}
        content["sitting"] += sorted((self.folder / "cache").glob("contact-*.json"))
        for run in self.chosen():
            folder = RunFolder(run)
            content.setdefault(run.row, []).extend(
                file for file in sorted(folder.path.glob("*")) if file.suffix in (".ckpt", ".json", ".csv", ".yaml")
            )
        for name, files in content.items():
            part = out / f".{name}.tar"
            with tarfile.open(part, "w") as archive:
                for file in files:
                    if file.exists():
                        archive.add(file, file.relative_to(self.folder))
            part.replace(out / f"{name}.tar")

    def told(self) -> str:
        """How far the runs are."""
        folders = [RunFolder(run) for run in self.chosen()]
        complete = sum(folder.complete for folder in folders)
        least = min(folder.epochs_done() for folder in folders)
        return f"{complete} of {len(folders)} runs complete, {least} of {folders[0].run.training.epochs} epochs done"


def variant_of(run: RunConfig) -> contact.Variant:
    """What of an engine a run relies on."""
    return contact.variant(run.model.cell, run.model.policy, run.model.num_layers)


def timed(sitting: Sitting, engines: Sequence[str]) -> None:
    """Print seconds of a training step: of each row's runs by each engine where it is right, and torch's.

    Without engines, of an epoch: of all runs, by those that are chosen."""
    if not engines:
        print(json.dumps({"row": "all", "seconds": seconds_per_epoch(*sitting.chosen(), steps=STEPS)}), flush=True)
        return
    rows: dict[str, list[RunConfig]] = {}
    for run in sitting.runs:
        rows.setdefault(architecture(run), []).append(run)
    engines, timed_torch = list(engines), set()
    for row, runs in rows.items():
        model, tested = runs[0].model, variant_of(runs[0])
        taken: dict[str, float] = {}
        for engine in engines:
            known = contact.verdict(engine, sitting.device.type, [tested], 0.0)  # what is not known now is not right
            wrong = contact.reason(known[tested])
            if not wrong:
                print(json.dumps({"engine": engine}), flush=True)
                try:
                    modules = [setup.make_module(replace(run, engine=engine)) for run in runs]
                    taken[engine] = seconds_per_step(modules, "train", STEPS)
                    print(json.dumps({"engine": engine, "row": row, "seconds": taken[engine]}), flush=True)
                except (RuntimeError, ConfigError) as error:  # out of memory, a shape that the engine does not serve
                    wrong = str(error).splitlines()[0]
            if wrong:
                print(f"{engine} is not used for {model.name}: {wrong}", flush=True)
        if taken and row == next(iter(rows)):
            most = HOPELESS * min(taken.values())
            engines = [engine for engine in engines if taken.get(engine, 0.0) < most]
        if model.policy == "always" and model.cell not in timed_torch:
            timed_torch.add(model.cell)
            print(json.dumps({"torch": model.cell, "seconds": measure_torch(runs[0])}), flush=True)


def train(sitting: Sitting, minutes: float, budget: float | None, out: Path | None) -> None:
    """One sitting."""
    start = time.monotonic() - time.process_time()  # imports count

    def left() -> float:
        return 60 * minutes - RESERVE - (time.monotonic() - start)

    print(json.dumps(contact.place(sitting.device.type)), flush=True)
    try:
        sitting.choose(left)
        if budget:
            sitting.shorten(budget, left)
        status, _ = sitting.child("run", seconds=left())
        print(f"{sitting.told()} (status {status})", flush=True)
    finally:
        if out:
            sitting.archive(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="skiprnn sitting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["plan", "train", "time", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends")
    parser.add_argument("--budget", type=float, help="minutes that the whole sweep may take")
    parser.add_argument("--archive", type=Path, help="folder for what is to be brought back")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine", help="for all runs, in place of the fastest for each")
    parser.add_argument("--of", nargs="*", default=[], help=argparse.SUPPRESS)
    given = arguments_of(parser, arguments)
    job.quieten()
    os.environ.setdefault("SKIPRNN_CACHE", str(given.folder.absolute() / "cache"))
    try:
        if given.command == "plan":
            experiment, runs, _ = plan.requested([*given.overrides, f"output={given.folder}"])
            plan.save_plan(experiment, " ".join(given.overrides), runs)
            print(f"{len(runs)} runs planned in {given.folder}")
        sitting = Sitting(given.folder, given.data_root, given.device, given.engine)
        if given.command == "train":
            train(sitting, given.minutes, given.budget, given.archive)
        elif given.command == "time":
            timed(sitting, given.of)
        elif given.command == "run":
            job.train(sitting.chosen())
    except job.USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(job.INTERRUPTED)


if __name__ == "__main__":
    main()
