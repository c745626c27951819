"""README cannot rot: its commands are run in a copy of the repository, or at least their files, flags and the values of
train.py's knobs are checked.

Commands are the lines of README's ```sh blocks, and what stands in `…` and begins with python, torchrun, pip or a script.
Those in `…` are only checked. Those in blocks are also run, in order, unless an HTML comment on the line before the block
says what they want that a test has not:

    <!-- not run: 8 GPUs -->                            the whole block
    <!-- not run (hf upload, lm_eval): a network -->    only its lines in which one of these stands
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import config
from distributed import Failure

REPO = Path(__file__).resolve().parents[1]
HOW_TO_MARK = ("if it wants what a test has not, put <!-- not run: why --> on the line before its block, or "
               "<!-- not run (part of the line): why --> if the other lines of the block can be run")
BLOCK = re.compile(r"(?:^ *<!-- not run(?: \(([^\n]+?)\))?: [^\n]+ -->\n)?^ *(```+|~~~+) *(\w*)[^\n]*\n(.*?)^ *\2 *$",
                   re.M | re.S)
SHELLS = ("sh", "bash", "shell", "console")


def lines_of(block: str) -> list[str]:
    """Commands, those that are continued after a backslash as one, without empty lines and comments."""
    lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read(text: str) -> tuple[list[tuple[list[str], list[str]]], list[str]]:
    """(commands to be run, others) of each block; commands in the text."""
    blocks = []
    for match in BLOCK.finditer(text):
        marked, (parts, _, language, content) = match[0].lstrip().startswith("<!--"), match.groups()
        command = re.search(r"^ *(\$ )?(python3?|torchrun|pip) .*", content, re.M)
        assert language in SHELLS or not command, f"{command[0]}: a block of commands begins with ```sh"
        if language in SHELLS:
            parts = parts.split(", ") if parts else [""] if marked else []
            lines = lines_of(content)
            for part in parts:
                assert any(part in line for line in lines), f"no line to mark with {part!r} in {lines}"
            skipped = [line for line in lines if any(part in line for part in parts)]
            blocks.append(([line for line in lines if line not in skipped], skipped))
    rest = BLOCK.sub("", text)
    assert "<!-- not run" not in rest, "a marker is not on the line before a block, or wants its reason after a colon"
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return blocks, [s for s in spans if re.match(r"(\w+=\S+ )*(python3?|torchrun|pip|\S+\.py) ", s)]


def simple_commands(line: str) -> list[list[str]]:
    """The words between && and the like, without variables that are set in front."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&")
    lexer.whitespace_split = True
    commands = [[]]
    for word in lexer:
        if set(word) <= set("();|&"):
            commands.append([])
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return [c for c in commands if c]


# ---- checked

def check(words: list[str]) -> None:
    """Raises Failure or AssertionError."""
    if words[0] == "pip" and "-r" in words:
        assert (REPO / words[words.index("-r") + 1]).exists(), "no such requirements"
    if "-m" in words and words[0] == "python":
        assert find_spec(words[words.index("-m") + 1]), "no such module"
    for word in words:
        if word.endswith(".py") or word.startswith("experiments/"):
            assert find(word).exists(), f"{word} does not exist"
        if word.startswith("experiments/studies/"):
            read_study(word)
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if not scripts or "-m" in words:
        return
    script, arguments = find(words[scripts[0]]), words[scripts[0] + 1:]
    if script.name not in ("train.py", "memory.py"):
        unknown = [flag for flag in flags_of(arguments) if flag not in flags_of(help_of(script).split())]
        assert not unknown, f"{script.name} has no {', '.join(unknown)}"
    elif "--help" not in arguments:
        own = () if script.name == "train.py" else flags_of(help_of(script).split())
        knobs = [a for a in arguments if not set(flags_of([a])) & set(own)]
        config.WORLD_SIZE = processes(words[:scripts[0]])
        config.parse([*knobs, "--device=cpu"])


def find(path: str) -> Path:
    """In the text, what is in experiments/ has its name alone."""
    return REPO / path if (REPO / path).exists() else REPO / "experiments" / path


def flags_of(words: list[str]) -> list[str]:
    return [match[0] for word in words if (match := re.match(r"--[\w-]+", word.lstrip("[")))]


@lru_cache
def help_of(script: Path) -> str:
    if "argparse" not in script.read_text():
        return ""
    return subprocess.run([sys.executable, script, "--help"], cwd=REPO, text=True, capture_output=True, check=True).stdout


def read_study(path: str) -> None:
    sys.path.insert(0, str(REPO / "experiments"))
    import sweep

    try:
        sweep.read_study(str(REPO / path))
    except sweep.Refused as e:
        raise AssertionError(e)


def processes(words: list[str]) -> int:
    """That torchrun starts, as far as it is said in numbers."""
    if "torchrun" not in words:
        return 1
    try:
        args = get_args_parser().parse_args([*words[words.index("torchrun") + 1:], "train.py"])
    except SystemExit:
        raise AssertionError("torchrun refuses its flags") from None
    nodes = args.nnodes.rpartition(":")[2]
    return int(args.nproc_per_node) * (int(nodes) if nodes.isdigit() else 1)


def problems(text: str) -> list[str]:
    blocks, spans = read(text)
    found = []
    for line in [line for run, skipped in blocks for line in run + skipped] + spans:
        for words in simple_commands(line):
            try:
                check(words)
            except (AssertionError, Failure) as e:
                found.append(f"{line}: {e}")
    return found


@pytest.fixture
def at_home(monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(config, "WORLD_SIZE", 1)
    return (REPO / "README.md").read_text(encoding="utf-8")


def test_files_flags_and_values_exist(at_home):
    assert "\n".join(problems(at_home)) == ""


def test_links_lead_somewhere(at_home):
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", at_home, re.M)}
    for link in re.findall(r"\]\(([^)\s]+)\)", at_home):
        assert re.match("https?:", link) or (link[1:] in headings if link[0] == "#" else (REPO / link).exists()), link


def test_flags_in_the_text_exist(at_home):
    sources = "".join(path.read_text() for path in [*REPO.glob("*.py"), *REPO.glob("experiments/*.py")]
                      if not path.name.startswith("test_"))
    for span in re.findall(r"`(--[^`]+)`", BLOCK.sub("", at_home)):
        for flag in flags_of(span.split()):
            known = {"knob", *(f.name for f in fields(config.Config))}  # --knob=value stands for all
            assert f'"{flag}"' in sources or flag[2:] in known, span


@pytest.mark.parametrize("wrong, words", [
    ("```sh\npython train.py configs/quickstart.py --max_token=1\n```\n", "did you mean 'max_tokens'"),
    ("```sh\npip install -r requirements.txt && python train.py configs/quickstar.py\n```\n", "does not exist"),
    ("<!-- not run: GPUs -->\n```sh\ntorchrun --nproc_per_mode=8 train.py configs/125m_sf.py\n```\n", "torchrun"),
    ("<!-- not run: GPUs -->\n```sh\ntorchrun --nproc_per_node=8 \\\n  train.py --shard_size=3\n```\n", "shard_size"),
    ("Or `python experiments/sweep.py\nexperiments/studies/small.py --job=2`.", "no --job"),
    ("Or `experiments/sweep.py experiments/studies/smal.py`.", "smal.py does not exist"),
    ("`python experiments/memory.py configs/772m_sf.py --processe=8`", "unknown knob"),
    ("`python sample.py runs/x --promt=x`", "no --promt"), ("`python samples.py runs/x`", "does not exist"),
    ("``` sh title=x\npython train.py configs/nope.py\n```\n", "nope.py does not exist"),
    ("~~~sh\npython train.py configs/nope.py\n~~~\n", "nope.py does not exist"),
    ("`python3 experiments/compare.py --folow runs/x`", "no --folow"),
    ("`pip install -r requirement.txt`", "no such requirements"), ("`X=1 python -m pytests`", "no such module")])
def test_what_is_wrong_is_found(at_home, wrong, words):
    found = problems(wrong)
    assert len(found) == 1 and words in found[0]


def test_commands_stand_in_blocks_for_commands():
    with pytest.raises(AssertionError, match="python train.py: a block of commands begins with ```sh"):
        read("```\npython train.py\n```\n")


# ---- run

def run_blocks(text: str, root: Path) -> None:
    for commands, _ in read(text)[0]:
        script = "pip() { :; }\n"  # what is installed is the tests' own
        for i, command in enumerate(commands):
            script += f"{command}\n[ $? = 0 ] || exit {i + 1}\n"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        try:
            result = subprocess.run(["bash", "-c", script], cwd=root, text=True, capture_output=True, timeout=300,
                                    stdin=subprocess.DEVNULL, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"})
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after 5 minutes: {'; '.join(commands)}\n{HOW_TO_MARK}")
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no word"])[-1]
            failed = commands[result.returncode - 1 : result.returncode] or commands  # all: bash itself ended
            raise AssertionError(f"{'; '.join(failed)}: {last}\n{HOW_TO_MARK}")


def test_commands_run(tmp_path):
    root = tmp_path / "repository"  # only what git knows, so that a file that nobody has added is missed
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, text=True, capture_output=True, check=True).stdout
    for file in filter(None, files.split("\0")):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / file, root / file)
    with open(root / "configs/quickstart.py", "a") as file:
        file.write("max_tokens = 20 * total_batch_tokens  # 20 steps instead of 700\neval_interval = 10\n")
    run_blocks((REPO / "README.md").read_text(encoding="utf-8"), root)


def test_a_command_that_fails_says_how_to_mark_it(tmp_path):
    with pytest.raises(AssertionError, match="(?s)cat b: .*No such file.*<!-- not run: why -->"):
        run_blocks("```sh\necho 1 > a && cat a  # made here\ncat b\n```\n", tmp_path)
    run_blocks("<!-- not run (cat b): nobody made it -->\n```sh\necho 1 > a && cat a  # made here\ncat b\n```\n", tmp_path)
    run_blocks("<!-- not run: nobody made it -->\n```sh\ncat b\n```\n", tmp_path)
