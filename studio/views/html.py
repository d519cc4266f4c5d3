"""Pieces of HTML. Everything that a person typed passes through `Markup.format`, which escapes it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

CLICKS = """
element.addEventListener('click', event => {
  const target = event.target.closest('[data-act]');
  if (!target || target.disabled || target.getAttribute('aria-busy') === 'true') return;
  if (target.dataset.busy !== undefined) target.setAttribute('aria-busy', 'true');
  setTimeout(() => target.removeAttribute('aria-busy'), 1500);
  trigger('click', {...target.dataset});
});
element.addEventListener('change', event => {
  const target = event.target.closest('[data-field]');
  if (!target) return;
  event.stopPropagation();
  const value = target.type === 'checkbox' ? target.checked : target.value;
  trigger('input', {...target.dataset, value: value});
});
element.addEventListener('input', event => {
  const filter = event.target.closest('[data-filter]');
  if (filter) {
    const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
    element.querySelectorAll('[data-search]').forEach(item =>
      item.hidden = !words.every(word => item.dataset.search.includes(word)));
  }
  const slider = event.target.closest('[data-slide]');
  if (slider) slider.parentElement.style.setProperty('--at', slider.value + '%');
});
element.addEventListener('click', event => {
  const copy = event.target.closest('[data-copy]');
  if (!copy) return;
  const done = () => { copy.dataset.said = copy.textContent; copy.textContent = 'Copied';
    setTimeout(() => copy.textContent = copy.dataset.said, 1500); };
  if (navigator.clipboard) navigator.clipboard.writeText(copy.dataset.copy).then(done);
});
watch('value', () => element.querySelectorAll('[data-shown] [data-field]').forEach(field => {
  if (field === document.activeElement) return;
  if (field.type === 'checkbox') field.checked = field.defaultChecked;
  else if (field.tagName === 'SELECT') [...field.options].forEach(option => option.selected = option.defaultSelected);
  else field.value = field.defaultValue;
}));
"""
"""Makes pieces talk: `data-act` is clicked, `data-field` is filled in, `data-filter` hides what `data-search` does not
match, `data-slide` moves a before/after line, `data-copy` copies. Listeners sit on the component, so that they outlive
its content. New content changes only what differs, so that what is typed stays; in `data-shown` it gives way."""


def html(template: str, /, **values: Any) -> Markup:
    """`template` with its `{names}` replaced, escaped unless they are HTML already."""
    return Markup(template).format(**values)


def join(pieces: Iterable[Any], between: str = "") -> Markup:
    return Markup(between).join(pieces)


def note(text: Any, kind: str = "plain") -> Markup:
    """A line that says something: kinds are plain, good, warn, bad."""
    role = "alert" if kind == "bad" else "status"
    return html('<p class="note {kind}" role="{role}">{text}</p>', kind=kind, role=role, text=text)


def notes(lines: Iterable[Any], kind: str = "warn") -> Markup:
    """Several lines in one box, none for none."""
    items = join(html("<li>{line}</li>", line=line) for line in lines)
    return html('<ul class="note {kind}">{items}</ul>', kind=kind, items=items) if items else Markup()


def empty(text: str, hint: str = "") -> Markup:
    """What stands where nothing is yet, with what to do."""
    return html('<div class="empty"><p>{text}</p><p>{hint}</p></div>', text=text, hint=hint)


def button(label: str, act: str, title: str = "", kind: str = "", disabled: bool = False, **data: Any) -> Markup:
    """A button that triggers `click` with its data. `title` is its accessible name where the label is short."""
    named = join(html(' data-{key}="{value}"', key=key.replace("_", "-"), value=value) for key, value in data.items())
    return html(
        '<button type="button" class="act {kind}" data-busy data-act="{act}"{named}{title}{off}>{label}</button>',
        kind=kind,
        act=act,
        named=named,
        title=html(' aria-label="{title}" title="{title}"', title=title) if title else "",
        off=Markup(" disabled") if disabled else "",
        label=label,
    )


def copy_button(text: str, label: str = "Copy") -> Markup:
    return html('<button type="button" class="act" data-copy="{text}">{label}</button>', text=text, label=label)


def link(href: str, label: str, download: bool = False) -> Markup:
    return html(
        '<a class="act" href="{href}"{save}>{label}</a>',
        href=href,
        save=Markup(" download") if download else "",
        label=label,
    )


def badge(text: str, kind: str = "") -> Markup:
    return html('<span class="badge {kind}">{text}</span>', kind=kind or text, text=text)


def facts(pairs: Mapping[str, Any]) -> Markup:
    """Names and values, without those that have none."""
    rows = (html("<dt>{k}</dt><dd>{v}</dd>", k=k, v=v) for k, v in pairs.items() if v not in (None, "", [], ()))
    return html('<dl class="facts">{rows}</dl>', rows=join(rows))


def picture(source: str, text: str, **data: Any) -> Markup:
    return html('<img src="{source}" alt="{text}" loading="lazy">', source=source, text=text)


def table(corner: str, heads: Sequence[Any], rows: Iterable[tuple[Any, Sequence[Any]]], label: str) -> Markup:
    """A table of pictures with a head for each row and column, which scrolls within the page."""
    head = join(html('<th scope="col">{text}</th>', text=text) for text in heads)
    body = join(
        html(
            '<tr><th scope="row">{text}</th>{cells}</tr>',
            text=text,
            cells=join(html("<td>{cell}</td>", cell=cell) for cell in cells),
        )
        for text, cells in rows
    )
    return html(
        '<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="matrix">'
        "<thead><tr><td>{corner}</td>{head}</tr></thead><tbody>{body}</tbody></table></div>",
        label=label,
        corner=corner,
        head=head,
        body=body,
    )


def progress(step: int, total: int, label: str) -> Markup:
    share = min(100.0, 100.0 * step / total) if total else 0.0
    return html(
        '<div class="bar" role="progressbar" aria-label="{label}" aria-valuemin="0" aria-valuemax="100" '
        'aria-valuenow="{share:.0f}"><span style="width:{share:.1f}%"></span></div>',
        label=label,
        share=share,
    )


def before_after(before: str, after: str, first: str, second: str) -> Markup:
    """Two pictures on one another; the slider, which the arrow keys move too, says how much of each is seen."""
    return html(
        '<figure class="slide"><img src="{before}" alt="{first}"><img class="over" src="{after}" alt="{second}">'
        '<input type="range" min="0" max="100" value="50" data-slide aria-label="From {first} to {second}">'
        "<figcaption><span>{first}</span><span>{second}</span></figcaption></figure>",
        before=before,
        after=after,
        first=first,
        second=second,
    )


def when(seconds: float) -> str:
    """A time, as short as today allows."""
    then, now = time.localtime(seconds), time.localtime()
    same_day = (then.tm_year, then.tm_yday) == (now.tm_year, now.tm_yday)
    return time.strftime("%H:%M" if same_day else "%d %b %H:%M" if then.tm_year == now.tm_year else "%d %b %Y", then)


def size(count: float) -> str:
    """Bytes for people."""
    power = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def field(setting: Any, value: Any) -> Markup:
    """A setting (`name`, `label`, `help`, `type`, `default`, `choices`) as an input that triggers `input`."""
    words = {"name": setting.name, "label": setting.label, "help": setting.help}
    search = f"{setting.name} {setting.label} {setting.help}".lower()
    shape = (
        '<label data-search="{search}" class="{kind}">'
        + _SHAPES.get(setting.type, _TEXT)
        + "<small>{help}</small></label>"
    )
    options = join(
        html('<option value="{c}"{on}>{c}</option>', c=choice, on=Markup(" selected") if choice == value else "")
        for choice in setting.choices
    )
    shown = "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else value
    on = Markup(" checked") if value is True else ""
    kind = "check" if setting.type == "bool" else ""
    return html(shape, **words, search=search, options=options, value=shown, on=on, kind=kind)


_TEXT = '<span>{label}</span><input type="text" data-field="{name}" value="{value}" placeholder="found by itself">'
_SHAPES = {
    "bool": '<input type="checkbox" data-field="{name}"{on}><span>{label}</span>',
    "int": '<span>{label}</span><input type="number" step="1" data-field="{name}" value="{value}" '
    'placeholder="found by itself">',
    "float": '<span>{label}</span><input type="number" step="any" data-field="{name}" value="{value}" '
    'placeholder="found by itself">',
    "choice": '<span>{label}</span><select data-field="{name}">{options}</select>',
    "list": '<span>{label}</span><textarea rows="2" data-field="{name}">{value}</textarea>',
}
