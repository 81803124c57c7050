"""Models: the registry, how the versions do, and which of them answers."""

from typing import Any

import streamlit as st

from models.bundle import Manifest
from models.errors import ModelError
from streaming.dashboard import charts, data
from streaming.dashboard.actions import promote, roll_back
from streaming.dashboard.context import Dashboard
from streaming.dashboard.layout import NOTHING, ask, cards, empty, percent, plain, title, told
from streaming.registry import ALIASES, CHALLENGER, CHAMPION, Registry, open_registry
from streaming.storage.registry_objects import Alias

HISTORY = 50


def show(dashboard: Dashboard) -> None:
    """Draw the page."""
    title("Models", "Every version is kept. The champion answers; a running stream follows a promotion at once.")
    registry = open_registry(dashboard.settings.home)
    versions = registry.versions()[::-1]
    if not versions:
        empty("No models yet: make one with `imagestream train`.")
        return
    if said := st.session_state.pop("moved", None):
        st.success(said, icon=":material/check:")
    targets = registry.targets()
    live = {row["version"]: row for row in ask(data.versions)}
    _heads(targets, live, len(versions))
    _table(registry, versions, targets, live)
    if not dashboard.read_only:
        _change(dashboard, versions, targets)
    left, right = st.columns(2)
    with left, st.container(border=True):
        _confusion(versions, targets[CHAMPION])
    with right, st.container(border=True):
        _comparison(targets)
    _history(registry)


@st.cache_data(max_entries=100, show_spinner="Reading the version …")
def _manifest(place: str, version: int, _registry: Registry) -> Manifest | str:  # noqa: ARG001  the key of the cache
    """What a version says of itself, or why it is refused; every file is hashed, so once is enough."""
    try:
        return _registry.read(version).manifest
    except ModelError as error:
        return str(error)


def _heads(targets: dict[Alias, int | None], live: dict[int, dict[str, Any]], count: int) -> None:
    champion, challenger = targets[CHAMPION], targets[CHALLENGER]
    seen = live.get(champion or 0, {})
    cards(
        [
            ("Champion", f"v{champion}" if champion else NOTHING, "The version that answers"),
            ("Challenger", f"v{challenger}" if challenger else NOTHING, "Scored beside the champion, answers nobody"),
            ("Versions", f"{count}", "Registered"),
            ("Answers of the champion", f"{seen.get('rows', 0):,}", "Rows in predictions"),
            ("Live accuracy", percent(seen.get("accuracy")), f"Of {seen.get('labelled', 0):,} labelled answers"),
        ]
    )


def _table(
    registry: Registry, versions: list[int], targets: dict[Alias, int | None], live: dict[int, dict[str, Any]]
) -> None:
    rows = []
    for version in versions[:HISTORY]:
        manifest = _manifest(registry.place, version, registry)
        row: dict[str, Any] = {
            "version": version,
            "alias": " ".join(alias for alias, target in targets.items() if target == version),
            "live answers": live.get(version, {}).get("rows", 0),
            "live accuracy": live.get(version, {}).get("accuracy"),
        }
        if isinstance(manifest, str):
            row["backbone"] = f"refused: {manifest}"
        else:
            row |= {
                "accuracy": manifest.metrics.get("accuracy"),
                "log loss": manifest.metrics.get("log_loss"),
                "macro F1": manifest.metrics.get("macro_f1"),
                "backbone": manifest.backbone.name,
                "projection": f"{manifest.projection.kind} → {manifest.projection.n_out}",
                "classifier": manifest.classifier.kind,
                "classes": len(manifest.classes),
                "training rows": manifest.training_data.rows,
            }
        rows.append(row)
    share = st.column_config.ProgressColumn(min_value=0, max_value=1, format="percent")
    st.dataframe(
        rows,
        hide_index=True,
        column_config={
            "accuracy": share,
            "live accuracy": share,
            "log loss": st.column_config.NumberColumn(format="%.4f"),
            "macro F1": st.column_config.NumberColumn(format="%.4f"),
            "live answers": st.column_config.NumberColumn(format="localized"),
            "training rows": st.column_config.NumberColumn(format="localized"),
        },
    )


def _change(dashboard: Dashboard, versions: list[int], targets: dict[Alias, int | None]) -> None:
    with st.container(border=True):
        columns = st.columns([1, 1.2, 2.4, 1, 1.2], vertical_alignment="bottom")
        version = columns[0].selectbox("Version", versions, format_func=lambda one: f"v{one}")
        alias = columns[1].selectbox("becomes", ALIASES)
        why = columns[2].text_input("because", max_chars=200, placeholder="kept in the history")
        same = targets[alias] == version
        if columns[3].button("Promote", type="primary", width="stretch", disabled=same):
            _confirm_promotion(dashboard, version, alias, why, targets[alias])
        if columns[4].button("Roll back", icon=":material/undo:", width="stretch"):
            _confirm_rollback(dashboard, alias, targets[alias])


@st.dialog("Promote?")
def _confirm_promotion(dashboard: Dashboard, version: int, alias: Alias, why: str, before: int | None) -> None:
    st.write(f"Version {version} becomes {alias} in place of {f'version {before}' if before else 'none'}.")
    st.caption("Its files and golden predictions are checked first.")
    if st.button("Yes, promote", type="primary"):
        with told():
            move = promote(dashboard.settings, version, alias, why)
            st.session_state.moved = f"{alias}: version {move.version} (before: {move.previous or 'none'})"
            st.rerun()


@st.dialog("Roll back?")
def _confirm_rollback(dashboard: Dashboard, alias: Alias, now: int | None) -> None:
    st.write(f"The {alias}, version {now or NOTHING}, gives way to the version before it.")
    if st.button("Yes, roll back", type="primary"):
        with told():
            move = roll_back(dashboard.settings, alias)
            st.session_state.moved = f"{alias}: version {move.version} (before: {move.previous})"
            st.rerun()


def _confusion(versions: list[int], champion: int | None) -> None:
    first = versions.index(champion) if champion in versions else 0
    head, choice = st.columns([2, 1], vertical_alignment="center")
    head.markdown("**Confusion** of live answers whose label is known")
    version = choice.selectbox(
        "Version",
        versions,
        index=first,
        format_func=lambda one: f"v{one}",
        label_visibility="collapsed",
        key="confused",
    )
    rows = ask(data.confusion, version)
    if rows:
        st.altair_chart(charts.confusion(rows), key="confusion")
    else:
        st.caption("No answer of this version has a label yet.")


def _comparison(targets: dict[Alias, int | None]) -> None:
    st.markdown("**Champion against challenger** on the same images")
    challenger = targets[CHALLENGER]
    found = ask(data.agreement, challenger) if challenger else None
    if found is None:
        st.caption(
            "No challenger has been scored beside the champion: promote one to `challenger` and let images come."
        )
        return
    cards(
        [
            ("Agreement", percent(found["agreement"]), f"Of {found['rows']:,} images"),
            (
                "Champion",
                percent(found["champion_accuracy"]),
                f"Accuracy on {found['judged']:,} labelled images that neither was fitted on",
            ),
            ("Challenger", percent(found["challenger_accuracy"]), f"Accuracy of version {challenger} on the same"),
        ]
    )
    if found["fitted"]:
        st.caption(
            f"Left out: {found['fitted']:,} labelled images that one of them was possibly fitted on (champion "
            f"{percent(found['fitted_champion_accuracy'])}, challenger {percent(found['fitted_challenger_accuracy'])})."
        )
    right = [
        {"who": "only the champion right", "images": found["only_champion_right"]},
        {"who": "only the challenger right", "images": found["only_challenger_right"]},
    ]
    st.altair_chart(charts.counts(right, "who", "images", "labelled images"), key="against")


def _history(registry: Registry) -> None:
    moves = sorted(
        (move for alias in ALIASES for move in registry.history(alias)), key=lambda one: one.at, reverse=True
    )
    with st.expander(f"History of the aliases ({len(moves)})", icon=":material/history:"):
        for move in moves[:HISTORY]:
            st.markdown(
                f"**{move.alias}** v{move.previous or NOTHING} → v{move.version or NOTHING} · {plain(move.by)} · "
                f"{move.at:%Y-%m-%d %H:%M} UTC · {plain(move.why)}"
            )
