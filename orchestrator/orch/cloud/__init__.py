"""Part of orch."""
