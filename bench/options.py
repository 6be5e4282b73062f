"""Options of the programs here: each has its range; what is wrong is one line, exit status 2."""

import argparse
import os
import re
import sys

MOST_SEGMENTS = 2**26  # of a pool, whose balancer lists them in a few GB


def wording():
    """model.py, which knows how text is shown. It comes late, as it brings torch, which a replay
    does without."""
    import model

    return model


class Parser(argparse.ArgumentParser):
    """An argument parser that is brief with what it refuses."""
    def parse_args(self, arguments=None):
        for text in sys.argv[1:] if arguments is None else arguments:
            # argparse takes that for no value at all.
            if re.fullmatch("--[^=]+=--", text):
                self.error(f"{text}: a value is expected")
        return super().parse_args(arguments)

    def error(self, message):
        """Of what argparse refuses. It quotes arguments of any length."""
        cut = wording().cut
        self.refuse(cut(" ".join(map(cut, message.split(" "))), 200))

    def refuse(self, problem):
        """Of what is wrong with the input otherwise."""
        self.exit(2, f"{self.prog}: error: {wording().one_line(problem)}\n")


def warn(said):
    """Of what is ignored."""
    print(wording().one_line(said), file=sys.stderr)


def number(convert, lowest, highest):
    """The type of an option: an int or float in a range."""

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= highest:
            kind = "an integer" if convert is int else "a number"
            said = f"{kind} from {lowest} to {highest} is expected"
            raise argparse.ArgumentTypeError(f"{wording().shown(text)}: {said}")
        return value

    return parse


def file_name(text):
    """The type of an option: a name that a file can have."""
    try:
        name = os.fsencode(text)
        ok = 0 < len(name) < 4096 and b"\0" not in name
    except ValueError:
        ok = False
    if not ok:
        said = "a file's name is expected"
        raise argparse.ArgumentTypeError(f"{wording().shown(text)}: {said}")
    return text


def check_segments(number):
    """Raises ValueError if a pool has too many."""
    if number > MOST_SEGMENTS:
        said = f"at most {MOST_SEGMENTS:,}, fewer or longer ones, are expected"
        raise ValueError(f"the pool has {number:,} segments; {said}")
