/* One translation unit: each kernel may inline what the others have in common. */
#include "aft.c"
#include "linear.c"
#include "pointwise.c"
#include "run.c"
