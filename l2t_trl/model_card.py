"""The model card of a trained model: TRL's, with what the run has measured."""

from pathlib import Path


def write_model_card(trainer, base_model: str, dataset_name: str, sections: str = "") -> Path:
    """
    Write `README.md` into the trainer's output folder, where it stays as it is from then on.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, which knows method and paper.
        base_model (`str`):
            The model that training started from, as the user named it.
        dataset_name (`str`):
            The data set, as the user named it; only Hub ids become links.
        sections (`str`, *optional*):
            Markdown to stand in front of the framework versions: results, recipe, limits.

    Returns:
        `Path`: the card.
    """
    folder = Path(trainer.args.output_dir)
    is_hub_id = dataset_name.count("/") == 1 and not Path(dataset_name).exists()
    trainer.create_model_card(model_name=folder.name, dataset_name=dataset_name if is_hub_id else None)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    # TRL writes None where a model has no Hub id.
    text = text.replace("[None](https://huggingface.co/None)", f"`{base_model}`")
    text = text.replace('model="None"', f'model="{trainer.hub_model_id or folder}"')
    if not is_hub_id:
        text = text.replace(f"`{base_model}`.", f"`{base_model}` on the data set `{dataset_name}`.", 1)
    mark = "### Framework versions"
    path.write_text(text.replace(mark, f"{sections}\n{mark}", 1), encoding="utf-8")
    # Pushing to the Hub would write TRL's card over this one.
    trainer.create_model_card = lambda *args, **kwargs: None
    return path
