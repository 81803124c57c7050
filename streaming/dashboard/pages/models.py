"""The page Models: registered versions, their live quality, promotion and rollback."""

from typing import Any

import streamlit as st

from models.bundle import Manifest
from models.errors import ModelError
from streaming.dashboard import charts, data
from streaming.dashboard.actions import promote, roll_back
from streaming.dashboard.context import Dashboard
from streaming.dashboard.layout import NOTHING, cards, empty, errors_shown, percent, plain, run_query, title
from streaming.registry import ALIASES, CHALLENGER, CHAMPION, Registry, open_registry
from streaming.storage.registry_objects import Alias

HISTORY = 50


def show(dashboard: Dashboard) -> None:
    """Draw the page."""
    title(
        "Models",
        "Registered versions. The champion serves predictions; a running stream switches at its next micro-batch.",
    )
    registry = open_registry(dashboard.settings.home)
    versions = registry.versions()[::-1]
    if not versions:
        empty("No models yet: create one with `imagestream train`.")
        return
    if said := st.session_state.pop("moved", None):
        st.success(said, icon=":material/check:")
    targets = registry.targets()
    live = {row["version"]: row for row in run_query(data.versions)}
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
    """Return a version's manifest or why it is rejected; cached, since reading it hashes every file."""
    try:
        return _registry.read(version).manifest
    except ModelError as error:
        return str(error)


def _heads(targets: dict[Alias, int | None], live: dict[int, dict[str, Any]], count: int) -> None:
    champion, challenger = targets[CHAMPION], targets[CHALLENGER]
    seen = live.get(champion or 0, {})
    cards(
        [
            ("Champion", f"v{champion}" if champion else NOTHING, "Version that serves predictions"),
            (
                "Challenger",
                f"v{challenger}" if challenger else NOTHING,
                "Version scored alongside the champion for comparison",
            ),
            ("Versions", f"{count}", "Number of registered versions"),
            ("Champion's predictions", f"{seen.get('rows', 0):,}", "Rows in the table predictions"),
            ("Live accuracy", percent(seen.get("accuracy")), f"On {seen.get('labelled', 0):,} labelled predictions"),
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
            "live predictions": live.get(version, {}).get("rows", 0),
            "live accuracy": live.get(version, {}).get("accuracy"),
        }
        if isinstance(manifest, str):
            row["backbone"] = f"rejected: {manifest}"
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
            "live predictions": st.column_config.NumberColumn(format="localized"),
            "training rows": st.column_config.NumberColumn(format="localized"),
        },
    )


def _change(dashboard: Dashboard, versions: list[int], targets: dict[Alias, int | None]) -> None:
    with st.container(border=True):
        columns = st.columns([1, 1.2, 2.4, 1, 1.2], vertical_alignment="bottom")
        version = columns[0].selectbox("Version", versions, format_func=lambda one: f"v{one}")
        alias = columns[1].selectbox("Alias", ALIASES)
        why = columns[2].text_input("Reason", max_chars=200, placeholder="recorded in the history")
        same = targets[alias] == version
        if columns[3].button("Promote", type="primary", width="stretch", disabled=same):
            _confirm_promotion(dashboard, version, alias, why, targets[alias])
        if columns[4].button("Roll back", icon=":material/undo:", width="stretch"):
            _confirm_rollback(dashboard, alias, targets[alias])


@st.dialog("Promote?")
def _confirm_promotion(dashboard: Dashboard, version: int, alias: Alias, why: str, before: int | None) -> None:
    st.write(f"Version {version} becomes {alias}" + (f" and replaces version {before}." if before else "."))
    st.caption("Its files and golden predictions are verified first.")
    if st.button("Confirm promotion", type="primary"):
        with errors_shown():
            move = promote(dashboard.settings, version, alias, why)
            st.session_state.moved = f"{alias}: version {move.version} (before: {move.previous or 'none'})"
            st.rerun()


@st.dialog("Roll back?")
def _confirm_rollback(dashboard: Dashboard, alias: Alias, now: int | None) -> None:
    st.write(f"The {alias}, version {now or NOTHING}, is replaced by the previous version.")
    if st.button("Confirm rollback", type="primary"):
        with errors_shown():
            move = roll_back(dashboard.settings, alias)
            st.session_state.moved = f"{alias}: version {move.version} (before: {move.previous})"
            st.rerun()


def _confusion(versions: list[int], champion: int | None) -> None:
    first = versions.index(champion) if champion in versions else 0
    head, choice = st.columns([2, 1], vertical_alignment="center")
    head.markdown("**Confusion matrix** of labelled live predictions")
    version = choice.selectbox(
        "Version",
        versions,
        index=first,
        format_func=lambda one: f"v{one}",
        label_visibility="collapsed",
        key="confused",
    )
    rows = run_query(data.confusion, version)
    if rows:
        st.altair_chart(charts.confusion(rows), key="confusion")
    else:
        st.caption("No prediction of this version has a label yet.")


def _comparison(targets: dict[Alias, int | None]) -> None:
    st.markdown("**Champion and challenger** on the same images")
    challenger = targets[CHALLENGER]
    found = run_query(data.agreement, challenger) if challenger else None
    if found is None:
        st.caption("No challenger has been scored: promote a version to `challenger` and publish images.")
        return
    cards(
        [
            ("Agreement", percent(found["agreement"]), f"On {found['rows']:,} images"),
            (
                "Champion",
                percent(found["champion_accuracy"]),
                f"Accuracy on {found['judged']:,} labelled images on which neither was fitted",
            ),
            (
                "Challenger",
                percent(found["challenger_accuracy"]),
                f"Accuracy of version {challenger} on the same images",
            ),
        ]
    )
    if found["fitted"]:
        st.caption(
            f"Excluded: {found['fitted']:,} labelled images on which one of them may have been fitted (champion "
            f"{percent(found['fitted_champion_accuracy'])}, challenger {percent(found['fitted_challenger_accuracy'])})."
        )
    right = [
        {"who": "only champion correct", "images": found["only_champion_right"]},
        {"who": "only challenger correct", "images": found["only_challenger_right"]},
    ]
    st.altair_chart(charts.counts(right, "who", "images", "labelled images"), key="against")


def _history(registry: Registry) -> None:
    moves = sorted(
        (move for alias in ALIASES for move in registry.history(alias)), key=lambda one: one.at, reverse=True
    )
    with st.expander(f"Alias history ({len(moves)})", icon=":material/history:"):
        for move in moves[:HISTORY]:
            st.markdown(
                f"**{move.alias}** v{move.previous or NOTHING} → v{move.version or NOTHING} · {plain(move.by)} · "
                f"{move.at:%Y-%m-%d %H:%M} UTC · {plain(move.why)}"
            )
