"""What every floor above uses: errors, configuration, devices, progress. Imports no torch at import time."""
