"""What the parts of the stream share."""

from dataclasses import dataclass

from cerberus import claims, clock, settings, window
from cerberus.decisions import models
from cerberus.online import user_rows
from cerberus.postgres import stores


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The settings, stores and model that the consumer and its parts work with.

    Attributes:
        config: Settings.
        spans: The window definition.
        model: Makes decisions.
        online: Redis: users' rows and partition states.
        postgres: Facts, history, decisions and epochs.
        claims: Says which decision on a transaction was the first.
        clock: The wall clock in ms since the Unix epoch.
    """

    config: settings.Settings
    spans: window.Spans
    model: models.Model
    online: user_rows.OnlineStore
    postgres: stores.Stores
    claims: claims.Claims
    clock: clock.Clock
