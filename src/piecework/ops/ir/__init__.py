"""The IR: programs of operators, what an operator declares of itself, and which provider runs it."""
