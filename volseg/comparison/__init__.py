"""Two time points of a patient: matched lesions, their changes, and the response."""
