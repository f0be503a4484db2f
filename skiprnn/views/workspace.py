"""The page's views as a workspace on wandb, from what the runs logged there."""

from typing import Any

from skiprnn.training.config import ConfigError


def workspace(entity: str, project: str) -> Any:
    """The same views as a wandb workspace, not yet saved: trade-off, learning, used samples."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as panels

    scores = {"accuracy": "accuracy", "mse": "mean squared error"}
    updates = panels.SummaryMetric("test/state_updates")
    tradeoff: list[Any] = [
        panels.ScatterPlot(
            title=f"Test {title} against state updates", x=updates, y=panels.SummaryMetric(f"test/{key}")
        )
        for key, title in scores.items()
    ]
    tradeoff += [panels.ScatterPlot(title="State updates against λ", x=panels.Config("lambda"), y=updates, log_x=True)]
    learning: list[Any] = [
        panels.LinePlot(title=f"Validation {title}", x="epoch", y=[f"validation/{key}"], groupby_rangefunc="minmax")
        for key, title in (scores | {"state_updates": "state updates", "loss": "loss"}).items()
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="skiprnn: accuracy against computation",
        sections=[
            workspaces.Section("Accuracy against computation", panels=tradeoff, is_open=True),
            workspaces.Section("Learning", panels=learning, is_open=True),
            workspaces.Section("Used samples", panels=[panels.MediaBrowser(media_keys=["usage"])], is_open=True),
        ],
        settings=workspaces.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")],
            pinned_columns=[
                *("config:lambda", "config:p_skip", "config:seed"),
                *("summary:test/accuracy", "summary:test/mse", "summary:test/state_updates", "summary:best_epoch"),
            ],
        ),
    )


def save(target: str) -> str:
    """Write the workspace to wandb; returns its address.

    Raises:
        ConfigError: no library, no key, no such project, or no server.
    """
    *entity, project = target.split("/")
    try:
        import wandb  # here, for it is slow to import and seldom wanted

        if not wandb.login(prompt=False):
            raise ConfigError("--wandb needs a key: wandb login, or WANDB_API_KEY")
        return workspace(entity[0] if entity else wandb.Api().default_entity or "", project).save().url
    except ModuleNotFoundError as error:
        raise ConfigError(f"--wandb needs {error.name}: pip install 'skiprnn[wandb]'") from None
    except wandb.errors.Error as error:
        raise ConfigError(f"--wandb {target}: {str(error).splitlines()[0]}") from None
