"""The pages cannot rot: files, flags, values and links that they name exist, and their blocks run.

A command is a line of a ```sh block, or stands in `…` and begins with python, torchrun, pip or a
script. All commands are checked. Blocks of ```sh and ```python are also run, page after page in one
copy of the repository, unless an HTML comment on the line before the block says what they need:

    <!-- not run: 8 GPUs -->                            the whole block
    <!-- not run (hf upload, lm_eval): a network -->    the lines in which one of these stands
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import config
from distributed import Failure

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted(REPO.glob("docs/*.md")), REPO / "experiments/README.md"]
BLOCK = re.compile(r"(?:^<!-- not run(?: \(([^\n]+?)\))?: [^\n]+ -->\n)?^```(\w*)\n(.*?)^```$",
                   re.M | re.S)
COMMAND = re.compile(r"(\$ )?(\w+=\S+ )*(python3?|torchrun|pip|\S+\.py) ")


def read(text: str) -> tuple[list[tuple[str, list[str], list[str]]], list[str]]:
    """(language, lines to be run, others) of each block; what stands in `…` outside of blocks."""
    blocks, rest = [], BLOCK.sub("", text)
    for match in BLOCK.finditer(text):
        parts, language, content = match.groups()
        lines = content.splitlines()
        if language == "sh":  # one that goes on after a backslash is one, comments are none
            lines = [line.strip() for line in content.replace("\\\n", " ").splitlines()]
            lines = [line for line in lines if line and not line.startswith("#")]
        elif language != "python":
            assert not any(map(COMMAND.match, lines)), f"```sh is missing: {content}"
        marks = parts.split(", ") if parts else [""] * match[0].startswith("<!--")
        assert all(any(mark in line for line in lines) for mark in marks), f"not in a line: {marks}"
        run = [line for line in lines if not any(mark in line for mark in marks)]
        blocks.append((language, run, [line for line in lines if line not in run]))
    assert "<!-- not run" not in rest, "a marker has no block or no reason"
    return blocks, [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]


# ---- checked

def find(path: str, *more: Path) -> Path | None:
    folders = REPO, REPO / "experiments", REPO / "experiments/studies", *more
    return next((folder / path for folder in folders if (folder / path).exists()), None)


def flags_of(words: list[str]) -> list[str]:
    return [match[0] for word in words if (match := re.match(r"--[\w-]+", word.lstrip("[")))]


def check_line(line: str) -> None:
    """Raises Failure or AssertionError."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&")
    lexer.whitespace_split = True
    between = "\0".join("\n" if {*word} <= {*"();|&"} else word for word in lexer).split("\n")
    for words in (command.strip("\0").split("\0") for command in between):
        if "pip" in words and "-r" in words:
            assert find(words[words.index("-r") + 1]), "no such requirements"
        if "python" in words and "-m" in words:
            assert find_spec(words[words.index("-m") + 1]), "no such module"
        for word in words:
            if (word.endswith(".py") or word.startswith("experiments/")) and "$" not in word:
                assert find(word), f"{word} does not exist"
        scripts = [i for i, word in enumerate(words) if word.endswith(".py") and "$" not in word]
        if scripts and "--help" not in words:
            check_flags(words[:scripts[0]], find(words[scripts[0]]), words[scripts[0] + 1:])


def check_flags(launcher: list[str], script: Path, arguments: list[str]) -> None:
    config.WORLD_SIZE = 1
    if "torchrun" in launcher:
        try:
            flags = launcher[launcher.index("torchrun") + 1:]
            args = get_args_parser().parse_args([*flags, "train.py"])
        except SystemExit:
            raise AssertionError("torchrun refuses its flags") from None
        nodes = args.nnodes.rpartition(":")[2]
        config.WORLD_SIZE = int(args.nproc_per_node) * int(nodes if nodes.isdigit() else 1)
    source = script.read_text()
    others = [a for a in arguments if not all(f'"{flag}"' in source for flag in flags_of([a]))]
    if script.name in ("train.py", "memory.py"):
        knobs = [a for a in arguments if a in others or not flags_of([a])]
        config.parse([*knobs, "--device=cpu"])
    else:
        assert not others, f"{script.name} has no {', '.join(others)}"


def problems(page: Path, text: str) -> list[str]:
    found = []
    try:
        blocks, spans = read(text)
    except AssertionError as e:
        return [str(e)]
    lines = [line for language, *parts in blocks if language == "sh" for line in sum(parts, [])]
    for line in [*lines, *filter(COMMAND.match, spans)]:
        try:
            check_line(line)
        except (AssertionError, Failure) as e:
            found.append(f"{line}: {e}")
    known = {*(f"--{f.name}" for f in fields(config.Config)), "--knob"}  # --knob=value: all
    sources = "".join(p.read_text() for p in [*REPO.glob("*.py"), *REPO.glob("experiments/*.py")])
    for span in spans:
        if re.fullmatch(r"[\w/]+\.(py|md|sh|txt)", span) and not find(span, page.parent):
            found.append(f"{span} does not exist")
        found += [f"no {f}" for f in flags_of([span]) if f not in known and f'"{f}"' not in sources]
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", BLOCK.sub("", text)):
        path, _, heading = link.partition("#")
        to = page.parent / path if path else page
        if not to.exists():
            found.append(f"the link {link} leads nowhere")
        elif heading:
            titles = re.findall(r"^#+ (.*)", text if to == page else to.read_text("utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
            found += [f"no heading for {link}"] * (heading not in anchors)
    return found


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(config, "WORLD_SIZE", 1)  # given back afterwards


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_what_a_page_names_exists(page):
    assert "\n".join(problems(page, page.read_text("utf-8"))) == ""


@pytest.mark.parametrize("wrong, words", [
    ("```sh\npython train.py configs/quickstart.py --max_token=1\n```\n", "mean 'max_tokens'"),
    ("```sh\npip install -r requirements.txt && python train.py configs/x.py\n```\n", "not exist"),
    ("<!-- not run: GPUs -->\n```sh\ntorchrun --nproc_per_mode=8 train.py\n```\n", "torchrun"),
    ("<!-- not run: GPUs -->\n```sh\ntorchrun --nproc_per_node=8 \\\n  train.py "
     "--shard_size=3\n```\n", "shard_size"),
    ("```\npython train.py x\n```\n", "```sh is missing"),
    ("Or `python experiments/sweep.py\nexperiments/studies/gap.py --job=2`.", "no --job"),
    ("`python experiments/memory.py configs/772m_sf.py --processe=8`", "unknown knob"),
    ("`python sample.py runs/x --promt=x`", "no --promt"), ("In `evaluat.py`.", "not exist"),
    ("`pip install -r requirement.txt`", "no such requirements"), ("`--max_token`", "no --max"),
    ("`python -m pytests`", "no such module"), ("[x](docs/nope.md)", "leads nowhere"),
    ("[x](#nope)", "no heading"), ("[x](docs/long_runs.md#nope)", "no heading")])
def test_what_is_wrong_is_found(wrong, words):
    found = problems(REPO / "README.md", wrong)
    assert len(found) == 1 and words in found[0]


# ---- run

def run_blocks(text: str, root: Path) -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for language, lines, _ in read(text)[0]:
        command = [sys.executable, "-c", "\n".join(lines)]
        if language == "sh":  # what pip would install is here; -e would overlook `a && b`
            ended = "\n{ [ $? = 0 ] || exit 1; } 2>/dev/null\n"
            command = ["bash", "-xc", "pip() { :; }\n" + "".join(line + ended for line in lines)]
        if language in ("sh", "python") and lines:
            done = subprocess.run(command, cwd=root, text=True, capture_output=True, timeout=300,
                                  stdin=subprocess.DEVNULL, env=env)
            assert not done.returncode, (
                f"{'; '.join(lines)}: {done.stderr[-1000:]}\nIf it needs what a test has not, put "
                "<!-- not run: why --> on the line before the block")


def test_blocks_run(tmp_path):
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, text=True, capture_output=True,
                           check=True).stdout  # a file that nobody has added is missed
    for file in filter(None, files.split("\0")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / file, tmp_path / file)
    with open(tmp_path / "configs/quickstart.py", "a") as file:
        file.write("max_tokens = 20 * total_batch_tokens  # of 700\neval_interval = 10\n")
    for page in PAGES:
        run_blocks(page.read_text("utf-8"), tmp_path)


def test_a_block_that_fails_says_how_to_mark_it(tmp_path):
    with pytest.raises(AssertionError, match="(?s)cat b.*No such file.*<!-- not run: why -->"):
        run_blocks("```sh\necho 1 > a && cat a  # made here\ncat b\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="NameError"):
        run_blocks("```python\nx\n```\n", tmp_path)
    run_blocks("<!-- not run (cat b): no b -->\n```sh\ncat a\ncat b\n```\n", tmp_path)
    run_blocks("<!-- not run: nobody made it -->\n```sh\ncat b\n```\n", tmp_path)
