"""Templates that mean harm get one line and a limit; what surrounds them survives, and nothing is left of their process."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data import rendering
from src.data.rendering import MOST_ENDED, ChatTemplate, Fault, Job, Renderer
from src.errors import UserError
from tests.data.chat_templates import CHATML, answer, user

ROOT = Path(__file__).resolve().parents[2]
ECHO = "{{ messages[0].content }}"
# Endless for one text, and the same as ECHO for others.
TRAP = ("{% if messages[0].content == 'trap' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}" + ECHO)
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # half characters too


def renderer_of(source: str, seconds: float = rendering.SECONDS) -> Renderer:
    return Renderer(ChatTemplate("a.jinja", source, {}), seconds)


def jobs(*texts: str) -> list[Job]:
    return [Job([user(text)]) for text in texts]


def child_of(renderer: Renderer) -> int:
    renderer.start()
    assert renderer._process is not None
    return renderer._process.pid


def gone(pid: int) -> bool:
    """Whether a process has ended, or does within some seconds; one that nobody waits for counts as ended."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid, 0)
            if Path("/proc/self").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            time.sleep(0.02)
            continue
        return True
    return False


@pytest.fixture(scope="module")
def echo() -> Iterator[Renderer]:
    with renderer_of(ECHO) as renderer:
        yield renderer


@given(st.lists(ANY_TEXT, max_size=5))
def test_texts_come_back_as_they_are(echo, texts):
    assert echo.render(jobs(*texts)) == texts


@pytest.mark.parametrize("text", ["", "\0", "\r\n", "\r", "\u2028\u2029\x85", "\ufeffa\ufeff", "\ud83d\ude00", "\U0001f600",
                                  "\udc80", '"\\u0041\\', "{{ 1 }}", "{% endif %}", "a" * 3_000_000, "\U0001f600" * 1_000_000])
def test_special_texts_come_back_as_they_are(echo, text):
    found, = echo.render(jobs(text))
    assert found == text


def test_no_jobs(echo):
    assert echo.render([]) == []


def test_a_conversation_without_messages(echo):
    assert echo.render([Job([]), *jobs("a")]) == [Fault("it has no messages"), "a"]


@pytest.mark.parametrize(("source", "words"), [
    # too much time; the first while it is compiled, since its parts are constants
    ("{{ 10 ** (10 ** 10) }}", "takes over 0.2 s"), ("{{ (messages | length + 9) ** (10 ** 9) }}", "takes over 0.2 s"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes over 0.2 s"),
    ("{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}", "RecursionError"),
    ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ("{% set x = range(99999) | list %}{% for a in x %}{{ x | sort | sum and '' }}{% endfor %}", "takes over 0.2 s"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", "takes over 0.2 s"),
    # too much memory
    ("{{ 'a' * 10 ** 10 }}", "over 512 MB of memory"), ("{{ messages[0].content * 10 ** 10 }}", "over 512 MB of memory"),
    ("{{ messages[0].content | center(10 ** 10) }}", "over 512 MB of memory"),
    ("{{ '%1000000000d' % 1 }}", "over 512 MB of memory"),
    ("{{ '{:1000000000d}'.format(1) }}", "over 512 MB of memory"), ("{{ [messages] * 10 ** 10 }}", "over 512 MB of memory"),
    ("{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
     "over 512 MB of memory|takes over 0.2 s"),
    ("{{ '%s' | format(1) | indent(10 ** 10, true) }}", "over 512 MB of memory"),
    # too long
    ("{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "text of over 16777216 characters"),
    ("{{ 'a' * 20 * 2 ** 20 }}", "text of over 16777216 characters"),
    # too deep
    ("\n{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}", "line 3 of the template: RecursionError"),
    ("{% set x = [] %}{% set ns = namespace(x=x) %}{% for a in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
     "RecursionError|takes over 0.2 s"),
    ("{{ " + "[" * 3000 + "]" * 3000 + " }}", "RecursionError"), ("{{ " + "-" * 90_000 + "1 }}", "RecursionError"),
    ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    # out of the sandbox
    ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "'__init__' of 'type' object is unsafe"),
    ("{{ messages | map(attribute='__class__.x') | list }}", "'__class__' of 'dict' object is unsafe"),
    ("{{ (messages | attr('__class__')).x }}", "'__class__' of 'list' object is unsafe"),
    ("{{ '{0.__class__.x}'.format(messages[0]) }}", "'__class__' of 'dict' object is unsafe"),
    ("{{ '{a.__class__.x}'.format_map({'a': 1}) }}", "'__class__' of 'int' object is unsafe"),
    ("{{ (messages[0].content.format | attr('__self__')).x }}", "has no attribute '__self__'"),
    ("{{ ('{0.__class__.x}' | attr('format'))(1) }}", "'__class__' of 'int' object is unsafe"),
    ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "begins with an underscore"),
    ("{{ namespace(__init__=1) }}", "begins with an underscore"), ("{{ self.__init__.__globals__ }}", "unsafe"),
    ("{{ raise_exception.__globals__.x }}", "'__globals__' of 'function' object is unsafe"),
    ("{{ dict.mro() }}", "has no attribute 'mro'"), ("{{ tojson.x }}", "'tojson' is undefined"),
    # changes to the messages
    ("\n{{ messages.append(1) }}", "line 2 of the template: access to attribute 'append' of 'list' object is unsafe"),
    ("{{ messages[0].update(content='') }}", "'update' of 'dict' object is unsafe"),
    ("{{ messages[0].pop('content') }}", "'pop' of 'dict' object is unsafe"),
    ("{{ dict.update(messages[0], content='') }}", "has no attribute 'update'"),
    ("{% set messages[0].content = '' %}", "expected token"), ("{% set messages.x = '' %}", "non-namespace object"),
    # other files
    ("{% include '/etc/passwd' %}", "no loader"), ("{% import 'a' as b %}", "no loader"), ("{% extends 'a' %}", "no loader"),
    # mistakes
    ("{{ raise_exception('Roles\nmust\x1b alternate') }}", "^the template refuses it: Roles must\x1b alternate$"),
    ("{{ raise_exception('a' * 10 ** 6) }}", "^the template refuses it: a{300}$"),
    ("\n\n{{ messages[0].text.x }}", "line 3 of the template: 'dict object' has no attribute 'text'"),
    ("{{ 1 / 0 }}", "line 1 of the template: ZeroDivisionError"), ("{{ 1 + 'a' }}", "line 1 of the template: TypeError"),
    ("{{ [10 ** 9999] }}", "the template: ValueError"), ("{{ undefined | tojson }}", "line 1 of the template: TypeError"),
])
def test_harmful_templates(source, words):
    begin = time.monotonic()
    # On a busy machine what is refused for another reason may take longer than that.
    with renderer_of(source, 0.2 if "takes over" in words else 2.0) as renderer:
        try:
            found, = renderer.render(jobs("a"))
        except UserError as error:  # already when it is compiled
            found = Fault(str(error).removeprefix("a.jinja: ").removesuffix("; correct the template, or choose another"))
    assert isinstance(found, Fault), found
    assert re.search(words, found.reason), found.reason
    assert "\n" not in found.reason and len(found.reason) < 500
    assert time.monotonic() - begin < 20


def test_messages_stay_as_they_are():
    with renderer_of("{% set messages = [] %}{% set messages = messages + [1] %}{{ messages }}") as renderer:
        messages = [user("a")]
        assert renderer.render([Job(messages)] * 2) == ["[1]"] * 2
        assert messages == [user("a")]


def test_the_others_render():
    texts = [str(number) for number in range(2500)]
    given = [*texts[:1500], "trap", "trap", *texts[1500:]]
    with renderer_of(TRAP, 0.1) as renderer:
        found = renderer.render(jobs(*given))
    assert found == [Fault("the template takes over 0.1 s", True) if text == "trap" else text for text in given]


def test_the_others_render_beside_faults_of_every_kind():
    source = ("{% if messages[0].content == 'memory' %}{{ 'a' * 10 ** 10 }}{% elif messages[0].content == 'refuse' %}"
              "{{ raise_exception('no') }}{% elif messages[0].content == 'long' %}{{ 'a' * 20 * 2 ** 20 }}{% endif %}" + ECHO)
    with renderer_of(source) as renderer:
        child = child_of(renderer)
        found = renderer.render(jobs("a", "refuse", "b"))
        assert child_of(renderer) == child
        found += renderer.render(jobs("memory", "c", "long", "d"))
    assert [text for text in found if isinstance(text, str)] == ["a", "b", "c", "d"]
    assert all(isinstance(found[place], Fault) for place in (1, 3, 5))


def test_a_template_that_has_to_be_stopped_again_and_again_is_given_up():
    with renderer_of(TRAP, 0.01) as renderer:
        found = renderer.render(jobs(*["trap"] * (MOST_ENDED + 5), "a"))
    assert found == [Fault("the template takes over 0.01 s", True)] * MOST_ENDED + [
        Fault(f"not rendered, since the template had to be stopped {MOST_ENDED} times", True)] * 6


def test_a_template_that_makes_too_long_texts_is_given_up_too():
    with renderer_of("{% if messages[0].content == 'a' %}a{% else %}{{ 'b' * 20 * 2 ** 20 }}{% endif %}") as renderer:
        found = renderer.render(jobs("a", *["b"] * 9))
    assert found[0] == "a" and ["over 16777216 characters" in fault.reason for fault in found[1:]] == [True] * 3 + [False] * 6
    assert found[4] == Fault(f"not rendered, since the template had to be stopped {MOST_ENDED} times", True)


def test_time_is_counted_for_each_conversation():
    """Together these take several times what one may."""
    with renderer_of("{% for a in range(20000) %}{{ '' }}{% endfor %}" + ECHO, 0.5) as renderer:
        texts = [str(number) for number in range(300)]
        assert renderer.render(jobs(*texts)) == texts


def test_a_long_conversation_may_become_longer():
    with renderer_of("{{ messages[0].content * 90 }}") as renderer:
        text = "a" * 200_000
        found, = renderer.render(jobs(text))
        assert found == text * 90


def test_a_conversation_that_is_too_large(monkeypatch):
    monkeypatch.setattr(rendering, "LARGEST_JOB", 1000)
    with renderer_of(ECHO) as renderer:
        monkeypatch.setattr(rendering, "_BATCH_BYTES", 2000)
        assert renderer.render(jobs("a", "b" * 2000, "c", "d" * 900, "e" * 900)) == [
            "a", Fault("it has over 0 MB of text"), "c", "d" * 900, "e" * 900]


def test_a_template_that_waits_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(rendering, "MOST_SECONDS", 0.3)
    with renderer_of(ECHO) as renderer:
        os.kill(child_of(renderer), signal.SIGSTOP)
        assert renderer.render(jobs("a")) == [Fault("the template takes over 0.3 s", True)]
        monkeypatch.undo()
        assert renderer.render(jobs("b")) == ["b"]


def test_a_child_that_was_killed_is_started_again():
    with renderer_of(ECHO) as renderer:
        child = child_of(renderer)
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert renderer.render(jobs("a")) == ["a"]
        assert child_of(renderer) != child


def test_chance_is_the_same_in_each_run():
    found = []
    for _ in range(2):
        with renderer_of("{{ range(1000) | random }} {{ lipsum() }}") as renderer:
            found += renderer.render(jobs("a", "b"))
    assert len(set(found)) == 1 and isinstance(found[0], str)


def test_the_day(monkeypatch):
    days = [f"{datetime.now():%d %b %Y}"]
    with renderer_of("{{ strftime_now('%d %b %Y') }}{{ strftime_now(format='') }}") as renderer:
        found, = renderer.render(jobs("a"))
    assert found in [*days, f"{datetime.now():%d %b %Y}"]
    monkeypatch.setenv("TZ", "Etc/GMT+5")
    with renderer_of("{{ strftime_now('%H') }}") as renderer:
        found, = renderer.render(jobs("a"))
    assert (datetime.now(UTC).hour - int(found)) % 24 in (5, 6)


def test_the_time_stays_that_of_the_beginning():
    """A prompt and its conversation must not be of two days."""
    renderer = renderer_of("{{ strftime_now('%X.%f') }}")
    found = []
    for _ in range(2):
        found += renderer.render(jobs("a", "b"))
        renderer.close()
    assert len(set(found)) == 1 and isinstance(found[0], str)


def test_nothing_is_left():
    def descriptors() -> list[str]:
        return sorted(os.listdir("/dev/fd"))

    before = descriptors()
    children = []
    for source in (ECHO, TRAP, "{{ 'a' * 10 ** 10 }}", "{% if %}"):
        with suppress(UserError), renderer_of(source, 0.1) as renderer:
            children.append(child_of(renderer))
            renderer.render(jobs("a", "trap", "b"))
            children.append(child_of(renderer))
    assert descriptors() == before
    for child in children:
        with pytest.raises(ProcessLookupError):  # nor does it wait to be collected
            os.kill(child, 0)


def test_a_renderer_may_be_closed_and_used_again():
    renderer = renderer_of(ECHO)
    renderer.close()
    assert renderer.render(jobs("a")) == ["a"]
    renderer.close()
    assert renderer.render(jobs("b")) == ["b"]
    renderer.close()
    renderer.close()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="the system doesn't show another process's limits")
def test_the_child_is_confined(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with renderer_of(ECHO) as renderer:
        child = child_of(renderer)
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
            assert resource.prlimit(child, kind) == (0, 0)
        assert 512 << 20 < resource.prlimit(child, resource.RLIMIT_AS)[1] < 2 << 30
        assert os.getsid(child) == child
        assert b"HF_TOKEN" not in Path(f"/proc/{child}/environ").read_bytes()
        assert set(os.listdir(f"/proc/{child}/fd")) <= {"0", "1", "2"}


def test_many_conversations():
    """Loose bounds: a machine may be busy."""
    talk = [user("What is 2 + 2?"), answer("4.")]
    with renderer_of(CHATML) as renderer:
        begin = time.monotonic()
        renderer.start()
        started = time.monotonic()
        found = renderer.render([Job(talk, True)] * 10_000)
        ended = time.monotonic()
    assert found == ["<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n"
                     "<|im_start|>assistant\n"] * 10_000
    assert started - begin < 5 and ended - started < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("caught", [True, False], ids=["caught", "not caught"])
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_signal_leaves_no_child(number, caught, busy):
    """The script's child is gone after the script, whether it was rendering or waiting."""
    code = f"""
import sys, time
from src.data.rendering import ChatTemplate, Job, Renderer

def main(arguments):
    with Renderer(ChatTemplate("a", {TRAP!r}, {{}}), 3.0) as renderer:
        renderer.start()
        print(renderer._process.pid, flush=True)
        if {busy}:
            renderer.render([Job([{{"role": "user", "content": "trap"}}])])
        time.sleep(60)

if {caught}:
    from src.cli.run import run
    run(main)
else:
    main([])
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as script:
        assert script.stdout is not None
        child = int(script.stdout.readline())
        time.sleep(0.1)
        os.kill(script.pid, number)
        script.communicate(timeout=30)
    assert script.returncode == (128 + number if caught and number != signal.SIGKILL else -number)
    assert gone(child)


def test_jinja_is_missing(monkeypatch):
    monkeypatch.setattr(rendering, "find_spec", lambda name: None)
    with renderer_of(ECHO) as renderer, pytest.raises(UserError, match="jinja2: chat templates need this package"):
        renderer.start()
