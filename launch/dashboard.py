"""The W&B workspace of a run as code: ``python launch/dashboard.py --entity me [--project cp-gdn]``.

Sections are those of the metric names (train, val, perf, comm, memory), all against train/step. With ``--dry-run`` the
specification is printed as JSON and nothing is sent; it is built without a network in either case.
"""

import argparse
import sys
from typing import Any

SECTIONS = {
    "Loss": ("train/loss", "val/loss", "val/bits_per_byte"),
    "Optimizer": ("train/grad_norm", "train/lr", "train/tokens_seen"),
    "Throughput": (
        "perf/tokens_per_s",
        "perf/tokens_per_s_per_gpu",
        "perf/mfu",
        "perf/step_time_s",
    ),
    "Waiting": ("comm/cp_exchange_ms", "comm/cp_exchange_mib", "perf/data_time_s"),
    "Memory": ("memory/max_active_gib", "memory/max_rss_gib"),
}


def build_workspace(entity: str, project: str) -> Any:
    """The workspace, unsaved. Raises ValueError where wandb-workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError(
            "the dashboard needs the optional package wandb-workspaces (pip install wandb-workspaces); training and "
            "its metrics do not"
        ) from error
    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[
                reports.LinePlot(x="train/step", y=[metric], title=metric) for metric in metrics
            ],
        )
        for name, metrics in SECTIONS.items()
    ]
    return workspaces.Workspace(
        entity=entity, project=project, name="cp_gdn training", sections=sections
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="The W&B workspace of a run as code.")
    parser.add_argument("--entity", default="entity", help="W&B user or team; needed to save")
    parser.add_argument("--project", default="cp-gdn")
    parser.add_argument("--dry-run", action="store_true", help="print the JSON instead of saving")
    args = parser.parse_args()
    try:
        workspace = build_workspace(args.entity, args.project)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.dry_run:
        print(workspace._to_model().model_dump_json(by_alias=True, indent=1))
    else:
        print(workspace.save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
