"""The YAML files that ship with the package; a package so that `importlib.resources` finds them in every install."""
