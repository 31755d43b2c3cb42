"""Examples of the optional integrations run only where their packages are installed."""

from importlib.util import find_spec

collect_ignore = [f"torchopt/integrations/{name}.py" for name in ("lightning", "transformers") if find_spec(name) is None]
