"""Settings with some values changed, also beyond the bounds that a variable has."""

import dataclasses


def changed(config, **values):
    """Return settings with other values, each told by its own name, whichever group it is in."""
    for name, value in values.items():
        if hasattr(config, name):
            config = dataclasses.replace(config, **{name: value})
            continue
        [group] = (
            f.name for f in dataclasses.fields(config) if hasattr(getattr(config, f.name), name)
        )
        other = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group: other})
    return config


def rebuilt(service, parts=None, **fields):
    """Return a service on the same pools with these parts and fields; it makes its other parts."""
    other = dataclasses.replace(service, **fields)
    vars(other).update(parts or {})
    return other
