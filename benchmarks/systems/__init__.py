"""Systems under test, a file each. Importing this package registers them; their own packages load with the system."""

from . import allears, deepfilternet3, echo, echo_peers, noisy, nsnet2, rnnoise, separate

__all__ = ["allears", "deepfilternet3", "echo", "echo_peers", "noisy", "nsnet2", "rnnoise", "separate"]
