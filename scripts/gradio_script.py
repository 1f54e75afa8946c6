"""Recognise handwritten digits in the browser with a model that train_script.py has saved:

python scripts/gradio_script.py --model_path lightning_logs/version_0/model.pt2 --port 7860
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="digits-")  # Gradio looks while it is imported

import gradio as gr
import numpy as np
import torch
from PIL import Image

DATA = Path(__file__).parent / "data"
EXAMPLES = 16
DIGITS = [str(digit) for digit in range(10)]


class Recogniser:
    """The exported network: `recogniser(image)` gives each digit's probability."""

    def __init__(self, path: Path) -> None:
        self.network = torch.export.load(path).module()

    def __call__(self, img: Image.Image | None) -> dict[str, float]:
        if img is None:
            raise gr.Error("Choose an image first: an example below, or one of your own.", print_exception=False)
        pixels = np.asarray(img.convert("L").resize((28, 28)), dtype=np.float32) / 255
        with torch.inference_mode():
            logits = self.network(torch.from_numpy(pixels)[None, None])
        return dict(zip(DIGITS, logits[0].softmax(dim=0).tolist(), strict=True))


def write_examples(folder: Path) -> list[str]:
    """Some digits of the test set as PNG files; returns their paths."""
    with np.load(DATA / "digits.npz") as arrays:
        images, labels = arrays["x_test"][:EXAMPLES], arrays["y_test"][:EXAMPLES]
    paths = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"{number:02d}_digit_{label}.png"
        Image.fromarray(image).resize((168, 168), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return paths


def ask_for_retraining() -> None:
    """Set the variable `retrain` of the work that runs this script (orch puts the address and the key here)."""
    request = urllib.request.Request(
        os.environ["ORCH_STATE_URL"].rstrip("/") + "/retrain",
        data=json.dumps(True).encode(),
        method="PUT",
        headers={"Authorization": f"Bearer {os.environ['ORCH_TOKEN']}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10):
            pass
    except urllib.error.URLError as error:
        raise gr.Error(f"Retraining could not be asked for: {error.reason}", print_exception=False) from error
    gr.Info("Training starts with the latest arguments. Watch it in APP and TRAIN DIAG.")


def build(model: Path, examples: list[str], flagged: str) -> gr.Blocks:
    with gr.Blocks(title="Digits", analytics_enabled=False) as page:
        gr.Interface(
            fn=Recogniser(model),
            inputs=gr.Image(label="img", type="pil", image_mode="L", height=280, sources=["upload", "clipboard"]),
            outputs=gr.Label(label="output", num_top_classes=10),
            examples=[[path] for path in examples],
            examples_per_page=10,
            cache_examples=False,
            flagging_mode="manual",
            flagging_options=[("Flag", "")],
            flagging_dir=flagged,
        )
        with gr.Row():
            gr.Markdown(f"Model: `{model}`")
            if os.environ.get("ORCH_STATE_URL"):
                gr.Button("Retrain").click(ask_for_retraining, inputs=None, outputs=None)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, default=DATA / "base_model.pt2", help="a model.pt2 (torch.export)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--flagged", default="flagged", help="folder for images marked with Flag")
    args = parser.parse_args()
    if not args.model_path.is_file():
        parser.error(f"--model_path {args.model_path}: there is no such file")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # an orderly end, so that nothing stays in /tmp
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page = build(args.model_path, write_examples(Path(os.environ["GRADIO_TEMP_DIR"])), args.flagged)
    page.launch(server_name=args.host, server_port=args.port, share=False, theme=theme, footer_links=[])


if __name__ == "__main__":
    main()
