# Binds a library to the symbols of glibc 2.28, on whatever newer glibc it is linked, as manylinux_2_28 asks.
#
# From 2.34 on, what was in libpthread, libdl and librt is in libc, under new versions: what is linked there loads nowhere older. The
# stand-ins made here have the old names and versions; in front of libc, they are what the static CUDA runtime is bound to. They are
# linked against and never installed: the real ones are on every Linux with glibc, new ones included.
#
#   perfusion_bind_to_glibc_2_28(TARGET)

set(threads condattr_setpshared create detach getspecific join key_create key_delete kill mutex_trylock mutexattr_destroy mutexattr_init
  mutexattr_setpshared mutexattr_settype once rwlock_destroy rwlock_init rwlock_rdlock rwlock_timedrdlock rwlock_timedwrlock rwlock_tryrdlock
  rwlock_trywrlock rwlock_unlock rwlock_wrlock rwlockattr_destroy rwlockattr_init rwlockattr_setpshared setspecific spin_destroy spin_init
  spin_lock spin_trylock spin_unlock)
list(TRANSFORM threads PREPEND pthread_)

function(perfusion_bind_to_glibc_2_28 target)
  # each symbol as C, name by name, since when it is there
  set(pthread GLIBC_2.2.5 ${threads} sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait)
  set(dl GLIBC_2.2.5 dlclose dlerror dlopen dlsym dlvsym GLIBC_2.3.4 dlmopen)
  set(rt GLIBC_2.2.5 shm_open shm_unlink)
  set(sonames pthread libpthread.so.0 dl libdl.so.2 rt librt.so.1)
  while(sonames)
    list(POP_FRONT sonames name soname)
    set(code "")
    set(versions "")
    foreach(each IN LISTS ${name})
      if(each MATCHES "^GLIBC_")
        string(APPEND versions "${each} { global:\n")
      else()
        string(APPEND code "void ${each}(void) {}\n")
        string(APPEND versions "  ${each};\n")
      endif()
    endforeach()
    string(REPLACE ";\nGLIBC" ";\n};\nGLIBC" versions "${versions}};\n")
    set(folder ${CMAKE_CURRENT_BINARY_DIR}/glibc_2_28)
    file(WRITE ${folder}/${name}.c "${code}")
    file(WRITE ${folder}/${name}.map "${versions}")
    add_custom_command(OUTPUT ${folder}/${soname} DEPENDS ${folder}/${name}.c ${folder}/${name}.map VERBATIM
      COMMAND ${CMAKE_CXX_COMPILER} -x c -fno-builtin -nostdlib -shared -fPIC -Wl,-soname,${soname} -Wl,--version-script,${folder}/${name}.map
        -o ${folder}/${soname} ${folder}/${name}.c)
    list(APPEND stands ${folder}/${soname})
  endwhile()
  add_custom_target(${target}_glibc DEPENDS ${stands})
  add_dependencies(${target} ${target}_glibc)
  target_link_options(${target} PRIVATE -Wl,--no-as-needed ${stands} -Wl,--as-needed)
  # libstdc++ asks this variable of glibc 2.32 whether it may count references without atomic instructions: it may not
  file(WRITE ${folder}/single_threaded.c "__attribute__((visibility(\"hidden\"))) char __libc_single_threaded = 0;\n")
  set_source_files_properties(${folder}/single_threaded.c PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc")
  target_sources(${target} PRIVATE ${folder}/single_threaded.c)
endfunction()
