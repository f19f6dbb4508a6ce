"""The matrices V and U of a decomposed site, read from a run's folder without torch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from spd_lightning.errors import BadInput, nearest
from spd_lightning.runs.artifacts import factorization


@dataclass(frozen=True)
class Factors:
    """The rank-one components of a site: component c is `U[c]ᵀ V[:,c]ᵀ` (law D1)."""

    V: Float[np.ndarray, "d_in C"]
    U: Float[np.ndarray, "C d_out"]


def factors(run: Path, site: str) -> Factors | None:
    """Return V and U of one site; None if the run has no decomposition (a bare harvest).

    Tied sites (law D9) store one pair of matrices: `V_site = U_partnerᵀ`, `U_site = V_partnerᵀ`.

    Raises:
        BadInput: the files are unreadable, or the site is not in them.
    """
    tensors = run / "decomposition.safetensors"
    description = run / "decomposition.json"
    if not (tensors.exists() and description.exists()):
        return None
    try:
        partner = factorization(run)["tied"].get(site)
        V, U = _read_factors(tensors, partner or site)
    except (ValueError, OSError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{tensors}: cannot be read ({error}); run fit again, or pull the run again"
        ) from error
    return Factors(U.T, V.T) if partner else Factors(V, U)


def _read_factors(path: Path, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Read V and U as the file holds them."""
    from safetensors import SafetensorError, safe_open

    prefix = f"components.{site}"
    V = f"{prefix}.V"
    U = f"{prefix}.U"
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if V not in names or U not in names:
                known = _sites(names)
                remedy = nearest(site, known)
                raise BadInput(f"site '{site}' is not in {path}; {remedy}")
            return file.get_tensor(V), file.get_tensor(U)
    except SafetensorError as error:
        raise ValueError(error) from error


def _sites(names: set[str]) -> set[str]:
    """Return the sites whose factors are among these tensors."""
    sites = set[str]()
    for name in names:
        if name.endswith((".V", ".U")):
            path = name.removeprefix("components.")
            sites.add(path[:-2])
    return sites
