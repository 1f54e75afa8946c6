"""The studio's page: About, Train and Deploy. `main_ui(state)` shows what is in `state` and writes what is asked for.

`state` needs these attributes: train_args, train_start, training, models, model, serving (see app.py).
"""

from __future__ import annotations

from typing import Any

import streamlit as st

ABOUT = """
### Studio

Train a classifier of handwritten digits, watch it learn, deploy it, try it.

1. **Train**: choose the arguments of the training script and start it.
2. **TRAIN DIAG**, the second tab: curves of all trainings, also while one runs.
3. **Deploy**: choose a trained model.
4. **EVAL**, the third tab: give it a digit; if you do not like the answer, retrain.

The scripts behind it are ordinary ones; none of them knows of this app.
"""


def about(state: Any) -> None:
    st.markdown(ABOUT)


def train(state: Any) -> None:
    arguments = st.text_area("Train Arguments", value=state.train_args, height=110)
    busy = state.train_start
    if st.button("Start Training", disabled=busy):
        state.train_args = arguments
        state.train_start = True
        st.rerun()
    training = state.training
    stage = training.get("stage", "not_started")
    if busy:
        progress = training.get("progress")
        if stage != "running":
            st.progress(0.0, text="Waiting for the training to start")
        elif progress is None:
            st.progress(0.0, text="Training: starting up")
        else:
            st.progress(min(1.0, max(0.0, progress)), text=f"Training: {progress:.0%}")
        show_metrics(training)
    elif stage == "succeeded":
        st.success("Training finished: its model is in Deploy.")
        show_metrics(training)
    elif stage == "failed":
        lines = [line for line in training.get("last_lines") or [] if line.strip()]
        message = training.get("message") or "see its last lines"
        st.error(f"Training failed ({training.get('reason')}): {message}")
        if lines:
            st.caption("Its last lines")
            st.code("\n".join(lines[-10:]), language=None, wrap_lines=True)
    elif stage == "stopped":
        st.warning("Training was stopped.")


def show_metrics(training: dict[str, Any]) -> None:
    metrics = training.get("metrics", {})
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "hp_metric"}
    if numbers:
        st.caption(" · ".join(f"{name} {value:.4g}" for name, value in sorted(numbers.items())))


def deploy(state: Any) -> None:
    model = st.selectbox("Select Model", state.models, key="model")
    if st.button("Deploy Model"):
        state.model = model
        st.rerun()
    serving = state.serving
    if serving.get("ready"):
        st.success(f"Deployed: {state.model}, ready in EVAL")
    elif serving.get("stage") == "failed":
        st.error(f"Deploying {state.model} failed: {serving.get('message')}")
    else:
        st.info(f"Deploying {state.model} ...")


PAGES = {"About": about, "Train": train, "Deploy": deploy}


def main_ui(state: Any) -> None:
    st.set_page_config(page_title="Studio")
    PAGES[st.sidebar.selectbox("Main Menu", list(PAGES))](state)


if __name__ == "__main__":
    st.info("This page belongs to an app: start the app with `orch run`, then open the address it prints.")
