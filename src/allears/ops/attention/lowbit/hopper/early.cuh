#pragma once

// The next kernel in the stream may start once all blocks have got here.
DEVICE void let_the_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// The place from which on a kernel needs what the kernel before it in the stream wrote. Launched early (``Kernel.bind`` of nvrtc.py), it gets here
// while that one still runs, and waits until all of it has ended; launched as usual, nothing happens. The next kernel may start from here on.
DEVICE void after_the_kernel_before() {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}
