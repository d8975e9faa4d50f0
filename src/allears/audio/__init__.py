"""Host-side audio: files, resampling, STFT, level, rooms, metrics. No nn.Module lives here."""
