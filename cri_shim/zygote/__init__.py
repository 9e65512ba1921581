"""The clean process that forks short-lived helpers, and the tasks that run in them. `__main__.py` is the process."""
