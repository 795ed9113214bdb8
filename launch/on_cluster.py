"""What a Slurm job asks for on a described machine: the options that were given, the description's defaults for the others, within its limits."""

from typing import Any

from regrowth.errors import UserError
from regrowth.launch.show import machine_of
from regrowth.launch.slurm import JobOptions


def options_on(cluster: str | None, asked: dict[str, Any]) -> JobOptions:
    """The options of a job.

    Args:
        cluster: a described machine, or the path of a description; None: without defaults and limits.
        asked: fields of `JobOptions`; None where nothing was asked for.

    Raises:
        UserError: there is no such machine, or more is asked for than it allows.
    """
    given = {name: value for name, value in asked.items() if value is not None and value != []}
    if cluster is None:
        return JobOptions(**given)
    machine = machine_of(cluster)
    slurm = machine.slurm
    defaults = {name: getattr(slurm, name) for name in ("partition", "account", "minutes", "gpus_per_node", "setup")}
    if "nodes" not in given:  # then as many as the plan needs
        defaults["ranks_per_node"] = machine.devices_per_node
    options = JobOptions(**{name: value for name, value in defaults.items() if value is not None} | given, max_nodes=slurm.max_nodes)
    if slurm.max_minutes and options.minutes > slurm.max_minutes:
        where = "--minutes" if "minutes" in given else "the usual --minutes"
        raise UserError(f"{where} {options.minutes}: --cluster {cluster} allows slurm.max_minutes = {slurm.max_minutes}. Ask for --minutes "
                        f"{slurm.max_minutes} or less: a run that is not finished by then goes into the queue again.")  # fmt: skip
    gpus = slurm.gpus_per_node if slurm.gpus_per_node is not None else machine.devices_per_node
    if options.gpus_per_node > gpus:
        key = "devices_per_node" if slurm.gpus_per_node is None else "slurm.gpus_per_node"
        raise UserError(f"--gpus-per-node {options.gpus_per_node}: nodes of --cluster {cluster} have {key} = {gpus}. "
                        f"Ask for at most {gpus} on each of more --nodes.")  # fmt: skip
    if (options.ranks_per_node or 0) > machine.devices_per_node:
        raise UserError(f"--ranks-per-node {options.ranks_per_node}: nodes of --cluster {cluster} have devices_per_node = "
                        f"{machine.devices_per_node}; a rank needs one of its own. Choose {machine.devices_per_node} or less.")  # fmt: skip
    return options
