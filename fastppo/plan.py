"""`fastppo plan`: what a run will take of a device's memory, and the micro-batch chosen for it, before any weight is loaded."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass, replace

import rich.console
import torch
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastppo import budget
from fastppo.batch.encode import encode_prompts, prompt_limit
from fastppo.budget import Budget, Choice, Device, Part, Prompts, Sizes
from fastppo.config import Config
from fastppo.errors import UserError, printable
from fastppo.model.adapters import add_policy
from fastppo.model.llama_trunk import LlamaTrunk
from fastppo.model.load import be_quiet, check_decoder, first_line, load_tokenizer, pick_device, pick_dtype, source_of
from fastppo.tasks import data_of, get_tasks, load_data
from fastppo.tasks.data import looks_like_path
from fastppo.tasks.task import BUILT_IN

WHEN = {
    "always": "all the time", "update": "in an update", "sampling": "while sampling", "graphs": "for replays",
    "device": "beside tensors",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """unread: why prompts are not known, and counted as long as the settings allow; "" where the data was read. parts: what is
    counted. total: bytes, of all that is there all the time or held by CUDA graphs, and the larger of update and sampling."""

    model: str
    device: Device
    dtype: str
    prompts: Prompts
    unread: str
    parts: tuple[Part, ...]
    choice: Choice

    def of(self, when: str) -> int:
        return sum(part.bytes for part in self.parts if part.when == when)

    @property
    def total(self) -> int:
        return self.of("always") + self.of("graphs") + self.of("device") + max(self.of("update"), self.of("sampling"))


def plan(config: Config, gpu: str | None, console: rich.console.Console | None) -> int:
    """Shows the plan as a table, or without a console as one JSON object. gpu: as ``--gpu`` has it; None: the device of here.

    Returns:
        The exit code: 0 where the run fits, 1 where it does not.

    Raises:
        UserError: a mistake in the settings, the model's name or configuration, or the GPU's name.
    """
    if gpu is not None and config.device == "cpu":
        raise UserError("--gpu and --device cpu: not both")
    device = Device.of(pick_device(config.device)) if gpu is None else Device.named(gpu)
    made = make_plan(config, device)
    if console is None:
        sys.stdout.write(json.dumps(as_json(made), indent=2) + "\n")
    else:
        show(made, console)
    return 1 if made.choice.too_much else 0


def make_plan(config: Config, device: Device) -> Plan:
    """The plan of a run on a device that need not be here."""
    dtype = pick_dtype(config.dtype, torch.device(device.kind))
    model, shown = shapes(config, dtype)
    stored = getattr(model.config, "quantization_config", None)
    quantised = config.dtype == "nf4" or (isinstance(stored, dict) and bool(stored.get("load_in_4bit")))
    llama = LlamaTrunk.suits(model.base_model)
    sizes = budget.sizes_of(add_policy(model, config), llama=llama, nf4=quantised)
    prompts, unread = read_prompts(config, sizes)
    counted = Budget(sizes, config, device, prompts)
    choice = counted.choose()
    if unread:
        each = f"each is counted with {prompts.longest:,} tokens (--max-prompt-tokens)"
        choice = replace(choice, notices=(f"prompts are not known ({unread}): {each}", *choice.notices))
    update = counted.update(choice.tokens, choice.activations)
    parts = [*counted.fixed(), *update, *counted.sampling(choice.tokens)]
    if choice.graphs:
        parts.append(counted.graphs(choice.tokens, choice.activations))
    if device.cuda:
        how = "context, loaded kernels, gaps between the allocator's blocks"
        parts.append(Part("CUDA", "device", device.memory - device.usable, how))
    numbers = ("nf4, computed in " if quantised else "") + str(dtype).removeprefix("torch.")
    return Plan(shown, device, numbers, prompts, unread, tuple(parts), choice)


def read_prompts(config: Config, sizes: Sizes) -> tuple[Prompts, str]:
    """(what is known of the run's prompts, why that is only what the settings allow: "" where their data was read).

    Of data on this disk, by the model's tokenizer; nothing is downloaded for it but that.

    Raises:
        UserError: a mistake in the data, or in the task's name.
    """
    allowed = Prompts.longest_allowed(sizes, config)
    tasks = get_tasks(config.task, config.template, to_train=True)
    given = [config.data if len(tasks) == 1 else data_of(task, config.data) for task in tasks]
    used = [data or task.data for task, data in zip(tasks, given, strict=True)]
    elsewhere = [data for data in used if data is not None and not _on_disk(data)]
    if elsewhere:
        why = f"data {elsewhere[0]!r} is not on this disk; on the hub it was not looked for"
    else:
        why = ""
        try:
            tokenizer = load_tokenizer(*source_of(config), config.trust_remote_code)
        except UserError:
            why = "its tokenizer cannot be loaded"
    if why:
        return allowed, why
    limit, name = prompt_limit(config, sizes.positions)
    prompts = []
    for task, data in zip(tasks, given, strict=True):
        loaded = load_data(task, data, config.seed)
        examples = [*loaded.train, *loaded.dev]
        prompts += encode_prompts(tokenizer, task, examples, limit=limit, limit_name=name)
    return Prompts.of(prompts), ""


def _on_disk(data: str) -> bool:
    """Or meant to be: what looks like a path is one that loading finds missing."""
    return data == BUILT_IN or os.path.exists(os.path.expanduser(data)) or looks_like_path(data)


def shapes(config: Config, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """(the base model on the device `meta`, where tensors have shapes and no numbers; how messages name it).

    Raises:
        UserError: no configuration, or none of a decoder.
    """
    source, shown = source_of(config)
    be_quiet()
    remote = {"trust_remote_code": config.trust_remote_code}
    try:
        found = AutoConfig.from_pretrained(source, **remote)
        check_decoder(found, shown)
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(found, dtype=dtype, **remote)
    except UserError:
        raise
    except Exception as error:  # transformers raises kinds of its own for every damage
        raise UserError(f"{shown}: its configuration cannot be used: {first_line(error)}") from error
    model.requires_grad_(False)
    return model, shown


def as_json(plan: Plan) -> dict[str, object]:
    """What ``--json`` writes; sizes in bytes."""
    return {
        "model": plan.model,
        "device": {"name": plan.device.name, "kind": plan.device.kind, "memory": plan.device.memory},
        "dtype": plan.dtype,
        "data_read": not plan.unread,
        "prompts": plan.prompts._asdict(),
        "fits": not plan.choice.too_much,
        "micro_batch_tokens": plan.choice.tokens,
        "activations": plan.choice.activations,
        "total": plan.total,
        "parts": [part._asdict() for part in plan.parts],
        "notices": [*plan.choice.notices, *plan.choice.too_much],
    }


def show(plan: Plan, console: rich.console.Console) -> None:
    where = f"{plan.device.name} with {budget.size(plan.device.memory)}"
    unread = "; the data was not read" if plan.unread else ""
    console.print(Text(printable(f"{plan.model}, {plan.dtype}, on {where}{unread}")), soft_wrap=True)
    longest, shared, mean = plan.prompts
    of_data = "" if mean is None else f", {mean:,.0f} in the mean, of which all share {shared:,}"
    console.print(Text(f"prompts of up to {longest:,} tokens{of_data}"), soft_wrap=True)
    table = Table()
    for heading in ("", "", "at most"):
        table.add_column(heading, no_wrap=True, justify="right" if heading else "left")
    table.add_column("how it is counted")
    for when, title in WHEN.items():
        for i, part in enumerate(part for part in plan.parts if part.when == when):
            table.add_row(*map(Text, (title if i == 0 else "", part.name, budget.size(part.bytes), part.how)))
        table.add_section()
    whole = "all the time, and the larger of update and sampling" + (", and graphs" if plan.of("graphs") else "")
    table.add_row(*map(Text, ("", "total", budget.size(plan.total), whole)), style="bold")
    console.print(table)
    choice = plan.choice
    console.print(Text(f"micro-batch: {choice.tokens:,} tokens of the tree, activations: {choice.activations}"))
    for line in (*choice.notices, *choice.too_much):
        console.print(Text(printable(line)), soft_wrap=True)
    does, style = ("it does not fit", "bold red") if choice.too_much else ("it fits", "green")
    console.print(Text(does + (", with the longest prompts that the settings allow" if plan.unread else ""), style=style))
