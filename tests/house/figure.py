"""Draws docs/trie.svg: the worked example as a trie over positions, and the mask of its row."""

from xml.sax.saxutils import escape

from house.example import PROMPT, WRITTEN, calls, example_trie, example_words

NODES, TRUNK = len(example_trie()), len(WRITTEN)
"""Nodes of the trie, and of the joined path; the rest is thread 2's own copy."""
BOX, CELL = 22, 9
LEFT, TRUNK_Y, THREAD_Y, MASK_Y = 30, 112, 186, 300
WIDTH, HEIGHT = LEFT + TRUNK * BOX + 30, MASK_Y + NODES * CELL + 40
INK, PAPER = "#222222", "#ffffff"
GIVEN, RETURNED = {*range(len(PROMPT)), TRUNK - 1}, range(27, 30)
KINDS = {
    "sampled": ("#7fb77e", "sampled by the model here: trained, weight 1"),
    "forced": ("#f2cf7e", "forced by the protocol: no loss"),
    "returned": ("#c9c9d6", "joined copy of thread 2: read again, no loss"),
    "given": ("#ffffff", "prompt, and the newline behind the end: no loss"),
}
RUNS = {
    "before the fork": ("#a9c6de", range(18)),
    "thread 1, the joined copy of thread 2, and what follows": ("#3f6f9f", range(18, TRUNK)),
    "thread 2, its own copy": ("#d9742b", range(TRUNK, NODES)),
}


def _kind(node: int) -> str:
    if example_trie().weight[node]:
        return "sampled"
    if node in GIVEN:
        return "given"
    return "returned" if node in RETURNED else "forced"


def _text(x: float, y: float, words: str, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {extra}>{escape(words)}</text>'


def _node(node: int, x: float, y: float, label_above: bool) -> list[str]:
    fill, word = KINDS[_kind(node)][0], example_words()[node]
    middle = x + BOX / 2
    at, turn = (y - 6, -55) if label_above else (y + BOX + 12, 55)
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{BOX}" fill="{fill}" stroke="{INK}"/>',
        _text(middle, y + 15, str(node), 'text-anchor="middle" font-size="11"'),
        _text(middle, at, word, f'font-size="11" transform="rotate({turn} {middle:g} {at:g})"'),
    ]


def _tree() -> list[str]:
    """Boxes at x = depth; a thread's own copy hangs below the positions that it shares."""
    trie, out = example_trie(), []
    for node in range(NODES):
        is_trunk = node < TRUNK
        x = LEFT + int(trie.depth[node]) * BOX
        out += _node(node, x, TRUNK_Y if is_trunk else THREAD_Y, is_trunk)
    x, y = LEFT + 17 * BOX + BOX / 2, TRUNK_Y + BOX
    path = f"M {x:g} {y} V {THREAD_Y + BOX / 2:g} H {LEFT + 18 * BOX}"
    out.append(f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="2"/>')
    note = "position = depth runs to the right:", "node 35 stands at 18, and so does node 18"
    out += [_text(LEFT, THREAD_Y + 4 + 16 * i, n, 'font-size="12"') for i, n in enumerate(note)]
    return out


def _mask() -> list[str]:
    """Row i, column j: filled where j <= i < end[j]."""
    trie, out = example_trie(), []
    size = NODES * CELL
    out.append(
        f'<rect x="{LEFT}" y="{MASK_Y}" width="{size}" height="{size}" fill="none" stroke="{INK}"/>'
    )
    for j in range(NODES):
        fill = next(color for color, nodes in RUNS.values() if j in nodes)
        x, y, height = LEFT + j * CELL, MASK_Y + j * CELL, (int(trie.end[j]) - j) * CELL
        out.append(
            f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{height - 1}" fill="{fill}"/>'
        )
    out.append(_text(LEFT, MASK_Y - 10, "key j →", 'font-size="12"'))
    x, y = LEFT - 8, MASK_Y + 50
    turned = f'font-size="12" transform="rotate(-90 {x} {y})"'
    out.append(_text(x, y, "← query i", turned))
    return out


def _legend() -> list[str]:
    x, y, out = LEFT + NODES * CELL + 40, MASK_Y + 12, []

    def line(words: str, fill: str | None = None, *, weight: str = "normal") -> None:
        nonlocal y
        if fill:
            out.append(
                f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{fill}" stroke="{INK}"/>'
            )
        indent = 20 if fill else 0
        out.append(_text(x + indent, y, words, f'font-size="12" font-weight="{weight}"'))
        y += 20

    line("nodes", weight="bold")
    for fill, words in KINDS.values():
        line(words, fill)
    y += 10
    line("mask: column j is one bar, from j to end[j] - 1", weight="bold")
    for name, (fill, _) in RUNS.items():
        line(name, fill)
    y += 10
    rows = sum(len(context) + len(sampled) for context, sampled in calls())
    line("what is saved", weight="bold")
    line(f"{NODES} nodes instead of {rows} tokens in a row per call")
    return out


def draw() -> str:
    """The figure as SVG text, the same on every machine."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" fill="{INK}">'
    )
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>'
    return "\n".join([head, paper, *_tree(), *_mask(), *_legend(), "</svg>"]) + "\n"
