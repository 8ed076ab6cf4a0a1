"""The program of a comparison process: reads questions from its input, writes verdicts to its output, a line each.

It imports nothing of this package. A question is [right answer, text, seconds]; a verdict is a value of `Outcome`.
"""

import json
import logging
import os
import signal
import sys


class _TooSlow(BaseException):
    """Passes through the `except Exception` of the algebra."""


def _interrupt(*_):
    raise _TooSlow


def _judge(answer: str, text: str) -> str:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    gold = parse(answer, kinds, fallback_mode="no_fallback", parsing_timeout=None)
    if not gold:
        return "not mathematics"
    found = parse(text, kinds, parsing_timeout=None)
    return "equal" if verify(gold, found, timeout_seconds=None) else "different"


def _limit_memory(gigabytes: int) -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = gigabytes << 30
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    except (ImportError, ValueError, OSError):  # not on this system
        pass


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; it ends this one
    logging.disable(logging.CRITICAL)
    _limit_memory(4)
    try:
        _judge("1", "1")
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=replies)
        return
    timed = hasattr(signal, "setitimer")
    if timed:
        signal.signal(signal.SIGALRM, _interrupt)
    print(json.dumps("ready"), file=replies)
    for line in sys.stdin.buffer:
        answer, text, seconds = json.loads(line)
        try:
            try:
                if timed:
                    signal.setitimer(signal.ITIMER_REAL, seconds)
                verdict = _judge(answer, text)
            finally:
                if timed:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        except _TooSlow:
            verdict = "too slow"
        except Exception:  # an expression beyond the algebra (recursion, memory) was not shown to be equal
            verdict = "different"
        print(json.dumps(verdict), file=replies)


if __name__ == "__main__":
    main()
