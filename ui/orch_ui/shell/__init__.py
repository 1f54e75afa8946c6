"""Pages that the flow server shows itself: index.html (the tabs) and waiting.html."""
