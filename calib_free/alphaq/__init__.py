"""The AlphaQ paper (arXiv 2606.04980): bit widths of expert matrices from weight spectra alone."""

from lfmc.calib_free.alphaq.allocation import AlphaQOptions, allocate
from lfmc.calib_free.alphaq.spectra import pl_alpha_hill

__all__ = ["AlphaQOptions", "allocate", "pl_alpha_hill"]
