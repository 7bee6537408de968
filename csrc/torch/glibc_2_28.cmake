# Binds a library that is linked on a newer glibc to the symbols of glibc 2.28, as manylinux_2_28 requires.
#
# From 2.34 on, the functions of libpthread, libdl and librt are in libc, with new symbol versions: a library linked there does not load on
# older systems. Stub libraries with the old symbol versions are linked instead of libc's; they are not installed. At run time the system's
# own libraries are loaded, which every Linux with glibc has.
#
#   perfusion_bind_to_glibc_2_28(TARGET)

set(threads condattr_setpshared create detach getspecific join key_create key_delete kill mutex_trylock mutexattr_destroy
  mutexattr_init mutexattr_setpshared mutexattr_settype once rwlock_destroy rwlock_init rwlock_rdlock rwlock_timedrdlock
  rwlock_timedwrlock rwlock_tryrdlock rwlock_trywrlock rwlock_unlock rwlock_wrlock rwlockattr_destroy rwlockattr_init
  rwlockattr_setpshared setspecific spin_destroy spin_init spin_lock spin_trylock spin_unlock)
list(TRANSFORM threads PREPEND pthread_)

function(perfusion_bind_to_glibc_2_28 target)
  # the symbols of each library, after the version that introduced them
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
      COMMAND ${CMAKE_CXX_COMPILER} -x c -fno-builtin -nostdlib -shared -fPIC -Wl,-soname,${soname}
        -Wl,--version-script,${folder}/${name}.map -o ${folder}/${soname} ${folder}/${name}.c)
    list(APPEND stubs ${folder}/${soname})
  endwhile()
  add_custom_target(${target}_glibc DEPENDS ${stubs})
  add_dependencies(${target} ${target}_glibc)
  target_link_options(${target} PRIVATE -Wl,--no-as-needed ${stubs} -Wl,--as-needed)
  # libstdc++ reads this variable of glibc 2.32 to count references without atomic instructions in a single thread; 0: always atomic
  file(WRITE ${folder}/single_threaded.c "__attribute__((visibility(\"hidden\"))) char __libc_single_threaded = 0;\n")
  set_source_files_properties(${folder}/single_threaded.c PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc")
  target_sources(${target} PRIVATE ${folder}/single_threaded.c)
endfunction()
