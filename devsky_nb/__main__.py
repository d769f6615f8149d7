"`python -m devsky_nb` is the command `devsky`: with little imported before Ctrl-C is one line instead of a traceback."
import sys


def main() -> int:  # the exit status
    "Load the command line, and run it."
    try:
        from .cli import main
        return main()
    except KeyboardInterrupt:
        print("devsky: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__": raise SystemExit(main())
