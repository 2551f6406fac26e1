"""Turn a finished training into the weights that the repository carries: half precision, measured as they are shipped.

    python scripts/ship_weights.py runs/trees weights/trees

Takes the *last* epoch, not the best one, so that nothing was chosen by looking at the held-out images. Writes the model
folder (`model.safetensors`, `config.json`, its card), the run's settings, log and curves, and `metrics.json`: what
`crossdino evaluate` measures of the stored half-precision weights on both held-out sets.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from crossdino.checkpoints import load_model, read_model_config, save_model
from crossdino.cli import main as crossdino
from crossdino.config import from_dict, read_yaml, with_changes, write_yaml
from crossdino.data.coco import load_coco
from crossdino.model_card import model_card, size_histogram

SIZE_BANDS = "small=0-32,medium=32-96"
DATA = (
    "Trained on the crossdino sample: 34 tiles of airborne images of the NEON network (Yellowstone), 740 tree crowns. "
    "Measured on a strip of the same site that shares no pixel with them."
)


def main() -> None:
    """Pack the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="output folder of `crossdino train`")
    parser.add_argument("output", type=Path, help="folder for the weights")
    options = parser.parse_args()
    run, output = options.run, options.output
    output.mkdir(parents=True, exist_ok=True)

    category_ids = read_model_config(run / "last")["category_ids"]
    model = load_model(run / "last")
    save_model(model, output, half=True, category_ids=category_ids)
    measured = {}
    for name in ("strip", "sites"):
        report = output / f"{name}.json"
        words = ["--ground-truth", f"sample/val_{name}.json", "--size-bands", SIZE_BANDS, "--json", str(report)]
        if crossdino(["evaluate", "--weights", str(output), *words]):
            raise SystemExit(f"evaluation on val_{name}.json failed")
        measured[name] = json.loads(report.read_text())
        report.unlink()
    # Where the run lay is nobody's business; everything else is what it was trained with.
    config = with_changes(from_dict(read_yaml(run / "config.yaml")), {"training.output": "runs/trees"})
    card = model_card(
        model,
        name="crossdino compact, tree crowns from the air",
        metrics=measured["strip"],
        sizes=size_histogram(load_coco("sample/train.json"), model.inference),
        data=DATA,
        license="apache-2.0",
        training={"recipe": config.name, "epochs": config.training.epochs, "seed": config.training.seed},
    )
    save_model(model, output, half=True, metrics=measured["strip"], category_ids=category_ids, card=card)
    (output / "metrics.json").write_text(json.dumps(measured, indent=2) + "\n")
    write_yaml(config, output / "training.yaml")
    for name in ("log.jsonl", "metrics.csv", "curves.png"):
        shutil.copyfile(run / name, output / name)


if __name__ == "__main__":
    main()
