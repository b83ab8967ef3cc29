"""The demo: draws toy faces, trains SimFLE on them without labels, and shows what came out.

    python data/demo.py

It takes the laptop's preset: 1,000 steps of a small net. Run again, it does what is missing.
The faces go to data/toy/, the rest to runs/toy/ in the current folder. Other programs have options:
data/toy.py for the faces, simfle.py for the training, data/probe.py and data/figures.py for the
results.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import figures
import probe
import simfle

LINEAR = (("from raw pixels, 16 × 16", "-pixels", ["--init", "pixels", "--workers", "0"]),
          ("from the backbone before training", "-random", ["--init", "random"]),
          ("from the backbone after it; the training saw no labels", "", []))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: that of the first part that did not end well, else 0."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    folder, trained = Path("runs", "toy"), Path("runs", "toy", "backbone.pt")
    code = (subprocess.run([sys.executable, HERE / "toy.py", "--out", HERE / "toy"]).returncode
            or simfle.main(["--data", str(HERE / "toy"), "--preset", "laptop"]))
    for part, arguments, leaves in (
            *((probe.main, ["toy", *options], f"probe-toy{name}.json")
              for _, name, options in LINEAR), (figures.main, ["toy"], "figures/attention.png")):
        made = (folder / leaves).exists()
        if not code and not (made and (folder / leaves).stat().st_mtime > trained.stat().st_mtime):
            code = part(arguments)
    if code:
        return code
    results = {words: json.loads((folder / f"probe-toy{name}.json").read_text())
               for words, name, _ in LINEAR}
    classes = next(iter(results.values()))["classes"]
    print(f"\nWhich of {len(classes)} expressions does a new toy face wear? A linear classifier is "
          f"right in\n  {100 / len(classes):5.1f} %  by chance")
    for words, result in results.items():
        print(f"  {result['accuracy']:5.1f} %  {words}")
    print(f"""At this size the masked autoencoder adds nothing measurable to this (data/RESULTS.md).
Pictures of what the net has learnt: {folder / "figures"}
Next, on photographs: git clone https://github.com/muxspace/facial_expressions
  python {HERE / "prepare.py"} muxspace --src facial_expressions
  python {HERE.parent / "simfle.py"} --data muxspace --preset laptop --steps 5000
  python {HERE / "probe.py"} muxspace""")
    return 0


if __name__ == "__main__":
    simfle.leave(main())
