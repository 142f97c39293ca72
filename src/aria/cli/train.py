"""``aria train``: run a training recipe, or write a first one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aria.cli.options import app, err, out


class Method(StrEnum):
    """What a recipe of ``--init`` trains."""

    lora = "lora"
    full = "full"


@app.command()
def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="TOML file; examples are in recipes/. With --init: the file to write."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of the recipe; repeatable."),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run. Default: runs/NAME, by the recipe's name.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Require a checkpoint to resume from.")] = False,
    stop_after: Annotated[
        float | None, typer.Option(metavar="MINUTES", min=0.0, help="Save and stop after this time; rerun to resume.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print memory, steps and time.")] = False,
    export: Annotated[bool, typer.Option("--export", help="Only export the newest checkpoint.")] = False,
    init: Annotated[
        Method | None,
        typer.Option(
            "--init",
            help="Only write a commented recipe for --data, to RECIPE, lora.toml or full.toml.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="With --init: JSONL file, folder or data set; repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="With --init: base model, a folder or Hub repository; default: nano."),
    ] = None,
) -> None:
    """Run a training recipe. Rerun to resume from the newest checkpoint; --dry-run and --init train nothing."""
    if init is not None:
        if settings or out_folder or resume or stop_after is not None or dry_run or export:
            raise ValueError("--init only writes a recipe; it takes RECIPE, --data and --model only")
        _init(init, recipe or Path(f"{init}.toml"), data or [], model)
        return
    if data or model:
        raise ValueError("--data and --model need --init; for a recipe use --set data.paths=... or model.path=...")
    if recipe is None:
        raise ValueError("which RECIPE? `aria train --init lora --data FOLDER` writes one")
    # Checkpoints are written with torch.distributed, which warns that there is one process only.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    from aria.train import Recipe
    from aria.train import train as run
    from aria.train.dry_run import dry_run as preview
    from aria.train.export import export_checkpoint
    from aria.train.run import begun

    read = Recipe.read(recipe, settings or ())
    folder = out_folder or Path("runs") / recipe.stem
    if dry_run:
        for part in preview(read, folder):
            if isinstance(part, str):
                # Paths are not wrapped, and brackets in them are not markup.
                out.print(part, soft_wrap=True, markup=False, highlight=False)
            else:
                out.print(part)
        return
    if resume and not begun(folder):
        raise ValueError(f"{folder} holds no checkpoint to resume from; leave out --resume to start there")
    if export:
        out.print(f"written to {export_checkpoint(folder, read)}", soft_wrap=True, markup=False, highlight=False)
        return
    seconds = None if stop_after is None else stop_after * 60.0
    run(read, folder, sampler=answer, stop_after=seconds, console=err)


def _init(method: Method, file: Path, data: list[str], model: str | None) -> None:
    """Write a first recipe."""
    from aria.hub import write_file
    from aria.train.starter import starter_recipe

    if not data:
        raise ValueError("--init needs data: --data FOLDER or --data FILE.jsonl")
    if file.exists():
        raise ValueError(f"{file} exists already; name another file: aria train OTHER.toml --init {method} ...")
    text = starter_recipe(method.value, data, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text)
    out.print(f"written to {file}; to train: aria train {file}", soft_wrap=True, markup=False, highlight=False)


def answer(model: Any, processor: Any, conversations: Sequence[Any], max_tokens: int) -> list[str]:
    """Greedy answers of a model during training."""
    from aria import AriaForConditionalGeneration
    from aria.processor.chat import END_OF_TURN

    generating = AriaForConditionalGeneration(model)
    answers = []
    for messages in conversations:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(generating.device, generating.dtype)
        ids = generating.generate(
            **inputs,
            max_new_tokens=max_tokens,
            stop_strings=[END_OF_TURN],
            tokenizer=processor.tokenizer,
            do_sample=False,
        )
        text = processor.decode(ids[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(text.split(END_OF_TURN)[0].strip())
    for parameter in model.parameters():
        if parameter.requires_grad:
            # The engine changes the layout of experts, but optimizers need weights and moments in the same layout.
            parameter.data = parameter.data.contiguous()
    return answers
