"""Options of the programs here: each has its range; what is wrong is one line, exit status 2."""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from traces import TIME_UNITS  # noqa: E402

MOST_TOKENS = 2**30  # of a request, whose chunks are listed
MOST_SEGMENTS = 2**26  # of a pool, whose balancer lists them in a few GB


def wording():
    """model.py, which knows how text is shown. It comes late, as it brings torch, which a replay
    does without."""
    import model

    return model


def is_first_rank() -> bool:
    """Of several, which torchrun has started, it speaks for all."""
    return os.environ.get("RANK", "0") == "0"


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
        """Of what is wrong with the input otherwise. Of several ranks the first says it."""
        said = f"{self.prog}: error: {wording().one_line(problem)}\n"
        self.exit(2, said if is_first_rank() else None)


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


def add_trace_form(parser):
    """Options for what a trace's lines do not say, as run_cluster.py has them."""
    block = "tokens of a hash id (default 512)"
    parser.add_argument("--trace-block", type=number(int, 1, 2**40), help=block)
    unit = "of timestamps (default ms)"
    parser.add_argument("--trace-time-unit", choices=TIME_UNITS, help=unit)


def check_segments(number):
    """Raises ValueError if a pool has too many."""
    if number > MOST_SEGMENTS:
        said = f"at most {MOST_SEGMENTS:,}, fewer or longer ones, are expected"
        raise ValueError(f"the pool has {number:,} segments; {said}")


def check_tokens(lines):
    """Raises ValueError for a request that is too long."""
    longest = max(lines, key=lambda line: line.total)
    if longest.total > MOST_TOKENS:
        said = f"prompt and answer are {longest.total} tokens; at most {MOST_TOKENS} are expected"
        raise ValueError(f"{longest.where}: {said}")


def output_file(text):
    """The type of an option: a file, opened at once, so that a wrong name is told before hours of
    work. It is written again as more is found, so a pipe will not do."""
    said = None
    try:
        file = None if text == "-" else open(file_name(text), "w")
    except OSError as error:
        said = f"{error.strerror}; a file that can be written is expected"
    else:
        if file is None or not file.seekable():
            said = "a file is expected, as the table is what is printed"
    if said:
        raise argparse.ArgumentTypeError(f"{wording().shown(text)}: {said}")
    return file


def run_main(main):
    """Runs a program, and ends the process with its exit status. Ctrl-C is a line. Who reads the
    output may leave early, as `head` does: there is nobody to tell then."""
    status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # if its encoding lacks a character
    try:
        try:
            status = main(sys.argv[1:]) or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        status = 1  # not all was read
    except OSError as error:  # a full disk, say
        warn(f"{os.path.basename(sys.argv[0])}: {error.strerror}")
    except KeyboardInterrupt:
        if is_first_rank():
            warn(f"{os.path.basename(sys.argv[0])}: stopped by Ctrl-C")
    except SystemExit as ended:  # of the parser
        status = ended.code or 0
    # At once: processes and threads that are still at work would be waited for, and what is left of
    # a process group may end an orderly exit in an abort.
    os._exit(status)


if __name__ == "__main__":
    print(__doc__)
