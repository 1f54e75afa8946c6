"""What `streamlit run` executes for every page. Alone in its folder, because Streamlit puts that on sys.path."""

from orch_ui.page import show

show()
