"""The two ways in which a comparison ends without a verdict; neither leaves `eval.grader.answers`."""


class UndecidedError(Exception):
    """The text is outside what the grader's own algebra can read or evaluate: the next rung of the ladder is asked."""


class TooLargeError(UndecidedError):
    """Read, but past a bound: no rung could decide it, so it is not tried."""


class UngradedError(Exception):
    """No verdict within the limits; the message is the reason that is shown."""
